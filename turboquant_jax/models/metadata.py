"""`LlamaConfig` from GGUF metadata; every key is read, neutral or refused (`strict_keys`)."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from turboquant_jax.models.config import LlamaConfig
from turboquant_jax.models.gguf_keys import GGUF_READ, GGUF_SERVED, architecture_of
from turboquant_jax.models.rope_scaling import (
    LinearScaling,
    RopeScaling,
    TabulatedScaling,
    YarnScaling,
    require_positive,
    yarn_attention_factor,
)
from turboquant_jax.models.strict_keys import exact_quotient, get, require_served


def config_from_gguf(
    metadata: Mapping[str, Any],
    tensors: Collection[str],
    rope_divisors: np.ndarray | None = None,
) -> LlamaConfig:
    """Read the metadata of a GGUF file whose tensors have these names.

    The tensors say what the metadata do not: the embedding is tied without an `output.weight`,
    there are the biases that are there, and `rope_freqs.weight` has the divisors [H/2] of RoPE's
    frequencies.

    Raises:
      ValueError: an architecture that is not served, or a key that is not, or is not known.
    """
    name, architecture = architecture_of(metadata)
    prefix = name + "."
    entries = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    require_served(entries, GGUF_SERVED, GGUF_READ, prefix)
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
        tie_embeddings="output.weight" not in tensors,
        rope_scaling=_rope_scaling(entries, prefix),
        bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_ids=tuple(dict.fromkeys(i for i in eos if i is not None)),
        qkv_bias=architecture.qkv_bias or "blk.0.attn_q.bias" in tensors,
        o_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        qk_norm=architecture.qk_norm,
        sliding_window=_window(entries, prefix),
    )
    return config if rope_divisors is None else _with_divisors(config, rope_divisors)


def _window(entries: Mapping[str, Any], prefix: str) -> int | None:
    """Tokens that a query sees in every layer, if they are fewer than the context; 0 is all."""
    key, longest = "attention.sliding_window", get(entries, "context_length", prefix)
    window = entries.get(key, 0)
    for name, value in ((key, window or 1), ("context_length", longest)):
        require_positive(prefix + name, value, whole=True)
    return window if 0 < window < longest else None


def _rope_scaling(entries: Mapping[str, Any], prefix: str) -> RopeScaling | None:
    """As llama.cpp reads it: a factor without a type is linear, one of 0 or 1 changes nothing."""

    def number(key: str, default: float) -> float:
        value = entries.get(key, default)
        require_positive(prefix + key, value)
        return value

    kind, key = entries.get("rope.scaling.type", "linear"), "rope.scaling.factor"
    key = key if key in entries else "rope.scale_linear"
    factor = number(key, 1.0) if entries.get(key) else 1.0
    attention = number("rope.scaling.attn_factor", 1.0)
    if kind == "yarn":
        return YarnScaling(
            factor=factor,
            original_max_position=int(
                number("rope.scaling.original_context_length", entries["context_length"])
            ),
            attention_factor=yarn_attention_factor(factor) * attention,
            beta_fast=number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=number("rope.scaling.yarn_beta_slow", 1.0),
        )
    if attention != 1:
        raise ValueError(f"{prefix}rope.scaling.attn_factor: got {attention}, expected yarn's")
    return None if kind == "none" or factor == 1 else LinearScaling(factor)


def _with_divisors(config: LlamaConfig, divisors: np.ndarray) -> LlamaConfig:
    """Divisors [H/2] that the file tabulates, as those of Llama 3.1."""
    if config.rope_scaling is not None or divisors.shape != (config.rotated_channels // 2,):
        raise ValueError(
            f"rope_freqs.weight: got {divisors.shape} divisors beside {config.rope_scaling}, "
            f"expected {config.rotated_channels // 2}, beside no other scaling"
        )
    table = tuple(float(divisor) for divisor in divisors)
    return dataclasses.replace(config, rope_scaling=TabulatedScaling(table))
