"""The decoder against Hugging Face transformers, where torch and it are installed."""

import jax.numpy as jnp
import numpy as np
import pytest

from turboquant_jax.models.checkpoint import load, packaged_smollm2
from turboquant_jax.models.huggingface_config import config_from_huggingface
from turboquant_jax.models.rope import inverse_frequencies
from turboquant_jax.models.safetensors import open_safetensors
from turboquant_jax.models.weights import read_huggingface

pytestmark = pytest.mark.reference

SIZES = dict(
    vocab_size=131,
    hidden_size=72,  # not heads * head_dim
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    initializer_range=0.3,
)
LLAMA_3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    return torch


def random_checkpoint(folder, *, shard, torch, **options):
    """Save a random transformers model in the folder; its logits on fixed tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**SIZES, **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
        model.save_pretrained(folder, max_shard_size=shard)
        tokens = torch.randint(0, SIZES["vocab_size"], (2, 150))
        return tokens.numpy(), model(tokens).logits.numpy(), model


@pytest.mark.parametrize(
    ("options", "shard"),
    [
        (dict(rope_parameters=LLAMA_3, tie_word_embeddings=False), "60KB"),
        (dict(tie_word_embeddings=True), "1GB"),
    ],
)
def test_random_llama(tmp_path, torch, forward, options, shard):
    import json

    tokens, expected, model = random_checkpoint(tmp_path, shard=shard, torch=torch, **options)
    config = config_from_huggingface(json.loads((tmp_path / "config.json").read_text()))
    assert config.tie_embeddings == options["tie_word_embeddings"]
    assert (config.rope_scaling is not None) == ("rope_parameters" in options)
    np.testing.assert_allclose(
        inverse_frequencies(config), model.model.rotary_emb.inv_freq.numpy(), rtol=1e-6
    )
    source = open_safetensors(tmp_path)
    assert (len(set(source.shards.values())) > 1) == (shard == "60KB")
    got = forward(read_huggingface(config, source, jnp.float32), jnp.asarray(tokens, jnp.int32))
    assert np.std(expected) > 0.5
    np.testing.assert_allclose(got, expected, atol=1e-3, rtol=0)


def test_smollm2(smollm2, torch, forward):
    """Logits and perplexity of a paragraph, against transformers' own reader of the file."""
    from transformers import AutoModelForCausalLM

    path = packaged_smollm2()
    reference = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    text = (
        "A lighthouse keeper has two duties that matter: the lamp must burn from dusk to dawn, "
        "and the log must say so. In forty years at the station he had missed neither."
    )
    tokens = np.array([smollm2.tokenizer.encode(text)])
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens)).logits.numpy()
    got = np.asarray(forward(smollm2.model, jnp.asarray(tokens, jnp.int32)))
    np.testing.assert_allclose(got, expected, atol=1e-3, rtol=0)

    def perplexity(logits):
        wide = logits[0, :-1].astype(np.float64)
        of_targets = np.take_along_axis(wide, tokens[0, 1:, None], axis=1)[:, 0]
        return np.exp(np.mean(np.log(np.exp(wide).sum(axis=1)) - of_targets))

    assert perplexity(got) == pytest.approx(perplexity(expected), rel=1e-5)


def test_chat_template(smollm2, torch):
    """The sandbox renders what transformers renders."""
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(tokenizer_object=smollm2.tokenizer.backend)
    reference.chat_template = smollm2.tokenizer.chat_template.text
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why is the sky blue?"},
        {"role": "assistant", "content": "Scattering."},
        {"role": "user", "content": "And at dusk?"},
    ]
    expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert smollm2.tokenizer.apply_chat(messages) == expected


def test_generated_folder_loads_whole(tmp_path, torch, forward):
    """`load` on what transformers saves, tokenizer and chat template with it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokens, expected, _ = random_checkpoint(
        tmp_path, shard="1GB", torch=torch, tie_word_embeddings=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, "?")), unk_token="?"
    )
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path)
    got = load(tmp_path)
    logits = forward(got.model, jnp.asarray(tokens, jnp.int32))
    np.testing.assert_allclose(logits, expected, atol=1e-3, rtol=0)
    assert got.tokenizer.apply_chat([{"role": "user", "content": "a"}]) == "a"
