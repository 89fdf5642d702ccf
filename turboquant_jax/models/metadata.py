"""`LlamaConfig` from GGUF metadata; every key is read, neutral or refused (`strict_keys`)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from turboquant_jax.models.config import LlamaConfig
from turboquant_jax.models.rope import inverse_frequencies
from turboquant_jax.models.rope_scaling import Llama3Scaling
from turboquant_jax.models.strict_keys import exact_quotient, get, require_served, require_wide

_GGUF_SERVED: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scale_linear": (0.0, 1.0),
    "rope.scaling.finetuned": (True, False),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "tensor_data_layout": ("Meta AI original pth",),
    "use_parallel_residual": (False,),
}

_GGUF_READ = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "attention.sliding_window",
    "rope.dimension_count",
    "vocab_size",
}


def config_from_gguf(
    metadata: Mapping[str, Any], *, tied: bool, rope_divisors: np.ndarray | None = None
) -> LlamaConfig:
    """Read the metadata of a GGUF file of architecture `llama`.

    The file says by its tensors what the metadata do not: `tied` when it has no `output.weight`,
    and Llama-3 scaling by the frequency divisors [H/2] in `rope_freqs.weight`.
    """
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"general.architecture: got {architecture!r}, expected 'llama'")
    prefix = "llama."
    entries = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    require_served(entries, _GGUF_SERVED, _GGUF_READ, prefix)
    require_wide(entries, "attention.sliding_window", "context_length", prefix)
    heads = get(entries, "attention.head_count", prefix)
    hidden = get(entries, "embedding_length", prefix)
    head_dim = entries.get("attention.key_length") or exact_quotient(hidden, heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if entries.get(key, head_dim) != head_dim:
            raise ValueError(f"{prefix}{key}: got {entries[key]}, expected head dim {head_dim}")
    eos = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    config = LlamaConfig(
        vocab_size=entries.get("vocab_size") or len(metadata.get("tokenizer.ggml.tokens", ())),
        hidden_size=hidden,
        intermediate_size=get(entries, "feed_forward_length", prefix),
        num_layers=get(entries, "block_count", prefix),
        num_heads=heads,
        num_kv_heads=entries.get("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position=get(entries, "context_length", prefix),
        rope_theta=entries.get("rope.freq_base", 10_000.0),
        rms_norm_eps=get(entries, "attention.layer_norm_rms_epsilon", prefix),
        tie_embeddings=tied,
        bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_ids=tuple(dict.fromkeys(i for i in eos if i is not None)),
    )
    return config if rope_divisors is None else _with_divisors(config, rope_divisors)


def _with_divisors(config: LlamaConfig, divisors: np.ndarray) -> LlamaConfig:
    """The Llama-3 scaling that gives these frequency divisors; refused if none does.

    Every release of Llama 3.1 to 3.3 takes 1 and 4 for the frequency factors and 8,192 tokens for
    the original context; the largest divisor is `factor`. The file holds them in float32.
    """
    scaling = Llama3Scaling(float(np.max(divisors)), 1.0, 4.0, 8192)
    expected = scaling.divisors(inverse_frequencies(config), config.rope_theta)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise ValueError(
            f"rope_freqs.weight: got {divisors.shape} divisors up to {np.max(divisors)}, "
            f"expected {expected.shape}, those of {scaling}"
        )
    return dataclasses.replace(config, rope_scaling=scaling)
