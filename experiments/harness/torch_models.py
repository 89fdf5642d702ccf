"""Models of transformers without its loaders: random weights made on the device, or those of GGUF.

The only module here that imports torch and transformers (extra `torch`) when it is imported.
"""

from pathlib import Path
from typing import Any

import torch
import transformers

from turboquant_jax.models.config import LlamaConfig
from turboquant_jax.models.gguf import GGUFFile, open_gguf
from turboquant_jax.models.gguf_keys import architecture_of
from turboquant_jax.models.metadata import read_gguf_config
from turboquant_jax.models.weights import GGUF_NAMES, HUGGINGFACE_NAMES, unpermute

_FAMILIES = {"llama": "Llama", "qwen2": "Qwen2"}
_PLAIN = ("o_bias", "mlp_bias", "qk_norm", "rope_scaling", "sliding_window")  # what has none


def device() -> torch.device:
    """The GPU, or else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_model(config: LlamaConfig, dtype: torch.dtype, where: torch.device) -> Any:
    """A decoder of these sizes with random weights, drawn where they lie."""
    torch.manual_seed(0)
    with where:
        return _empty(config, "llama", dtype)


def model_of_gguf(path: Path, dtype: torch.dtype, where: torch.device) -> Any:
    """A decoder with the dequantized weights of a GGUF file.

    Raises:
      ValueError: an architecture other than plain Llama or Qwen2.
    """
    source = open_gguf(path)
    name, _ = architecture_of(source.metadata)
    config = read_gguf_config(source)
    model = _empty(config, name, torch.float32)
    weights = dict(_weights(source, config))
    if config.tie_embeddings:
        weights[HUGGINGFACE_NAMES["head"]] = weights[HUGGINGFACE_NAMES["embedding"]]
    model.load_state_dict(weights)
    return model.to(where, dtype)


def _empty(config: LlamaConfig, architecture: str, dtype: torch.dtype) -> Any:
    if architecture not in _FAMILIES or any(getattr(config, name) for name in _PLAIN):
        raise ValueError(
            f"model: got {architecture!r} with {config}, expected plain Llama or Qwen2"
        )
    described = getattr(transformers, f"{_FAMILIES[architecture]}Config")(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_embeddings,
        bos_token_id=config.bos_id,
        eos_token_id=None,  # generation goes on
        pad_token_id=0,
    )
    made = transformers.AutoModelForCausalLM.from_config(described, dtype=dtype).eval()
    return made.requires_grad_(False)


def _weights(source: GGUFFile, config: LlamaConfig) -> Any:
    """(name in transformers, tensor) of every tensor of the file."""
    interleaved = architecture_of(source.metadata)[1].interleaved
    heads = {"layers.q": config.num_heads, "layers.k": config.num_kv_heads}
    for matrix, name in GGUF_NAMES.items():
        for layer in range(config.num_layers if "{}" in name else 1):
            if (own := name.format(layer)) in source.tensors:
                tensor = source.read(own)
                if interleaved and matrix in heads:
                    tensor = unpermute(tensor, heads[matrix])
                yield HUGGINGFACE_NAMES[matrix].format(layer), torch.from_numpy(tensor)
