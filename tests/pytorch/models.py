"""Tiny models of transformers with random weights, of every served family."""

import pytest

from tests.pytorch.skip import torch

transformers = pytest.importorskip("transformers", reason="needs transformers: make test-torch")

from turboquant_jax.pytorch.supported import CACHE as CACHE  # noqa: E402

SIZES = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, vocab_size=96, max_position_embeddings=512,
    pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
SLIDING = dict(use_sliding_window=True, sliding_window=24, max_window_layers=0)
FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": dict(sliding_window=None),
    "Mistral, sliding": dict(sliding_window=24),
    "Qwen2, sliding": SLIDING,
}


def random_model(family, **changes):
    name = family.split(",")[0]
    config = getattr(transformers, f"{name}Config")(**SIZES | FAMILIES[family] | changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    model.generation_config.pad_token_id = 0
    for name_, parameter in model.named_parameters():
        if name_.endswith("bias"):  # of Qwen2, whose biases begin at 0
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def prompts(batch, count, padding=()):
    """Random prompts with as many tokens of padding on the left; ids and attention mask."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 96, (batch, count), generator=generator)
    mask = torch.ones_like(ids)
    for row, pads in enumerate(padding):
        ids[row, :pads] = mask[row, :pads] = 0
    return dict(input_ids=ids, attention_mask=mask)
