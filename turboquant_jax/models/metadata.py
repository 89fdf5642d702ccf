"""`LlamaConfig` from a Hugging Face `config.json` and from GGUF metadata.

Both readers know every key they meet: a key is read, is known not to touch the computation, or is
refused by a ValueError that names it, what it held and what was expected.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from turboquant_jax.models.config import Llama3Scaling, LlamaConfig
from turboquant_jax.models.huggingface_keys import HF_NEUTRAL, HF_READ, HF_SERVED
from turboquant_jax.models.rope import inverse_frequencies, scaling_factors

# The default of `LlamaConfig` in transformers where a key is absent; no default: the key is needed.
_HF_DEFAULTS = {"rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2}


def config_from_huggingface(entries: Mapping[str, Any]) -> LlamaConfig:
    """Read the object of a `config.json`, of transformers 4 or 5."""
    _require_served(entries, HF_SERVED, HF_READ | HF_NEUTRAL)
    _require_full_attention(entries)
    if "model_type" not in entries:
        raise ValueError("model_type: got nothing, expected 'llama' or 'mistral'")
    heads, hidden = _get(entries, "num_attention_heads"), _get(entries, "hidden_size")
    theta, scaling = _huggingface_rope(entries)
    eos = entries.get("eos_token_id", _HF_DEFAULTS["eos_token_id"])
    return LlamaConfig(
        vocab_size=_get(entries, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_get(entries, "intermediate_size"),
        num_layers=_get(entries, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=entries.get("num_key_value_heads") or heads,
        head_dim=entries.get("head_dim") or _exact_quotient(hidden, heads),
        max_position=_get(entries, "max_position_embeddings"),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=entries.get("rms_norm_eps", _HF_DEFAULTS["rms_norm_eps"]),
        tie_embeddings=bool(entries.get("tie_word_embeddings", False)),
        bos_id=entries.get("bos_token_id", _HF_DEFAULTS["bos_token_id"]),
        eos_ids=() if eos is None else tuple(eos if isinstance(eos, list) else [eos]),
    )


def _require_full_attention(entries: Mapping[str, Any]) -> None:
    """No layer sees less than the whole context."""
    _require_wide(entries, "sliding_window", "max_position_embeddings")
    kinds = entries.get("layer_types") or []
    if not (isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)):
        raise ValueError(f"layer_types: got {kinds!r}, expected 'full_attention' for every layer")


def _require_wide(entries: Mapping[str, Any], key: str, context: str, prefix: str = "") -> None:
    """A window as long as the context hides nothing."""
    window, longest = entries.get(key), entries.get(context)
    if window and not (type(window) is type(longest) is int and window >= longest):
        raise ValueError(
            f"{prefix}{key}: got {window!r}, expected none below the context of {longest!r} tokens"
        )


def _huggingface_rope(entries: Mapping[str, Any]) -> tuple[float, Llama3Scaling | None]:
    """Theta and scaling: `rope_theta` beside `rope_scaling`, or both inside `rope_parameters`."""
    key = "rope_parameters" if entries.get("rope_parameters") else "rope_scaling"
    rope = entries.get(key) or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"{key}: got {rope!r}, expected an object")
    theta = rope.get("rope_theta", entries.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"{key}.rope_type: got {kind!r}, expected 'default' or 'llama3'")
    _require_served(rope, {"partial_rotary_factor": (None, 1)}, _HF_ROPE, prefix=key + ".")
    if kind == "default":
        return theta, None
    return theta, Llama3Scaling(
        factor=_get(rope, "factor", key + "."),
        low_freq_factor=_get(rope, "low_freq_factor", key + "."),
        high_freq_factor=_get(rope, "high_freq_factor", key + "."),
        original_max_position=_get(rope, "original_max_position_embeddings", key + "."),
    )


_HF_ROPE = {
    "rope_theta",
    "rope_type",
    "type",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
}

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
    _require_served(entries, _GGUF_SERVED, _GGUF_READ, prefix)
    _require_wide(entries, "attention.sliding_window", "context_length", prefix)
    heads = _get(entries, "attention.head_count", prefix)
    hidden = _get(entries, "embedding_length", prefix)
    head_dim = entries.get("attention.key_length") or _exact_quotient(hidden, heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if entries.get(key, head_dim) != head_dim:
            raise ValueError(f"{prefix}{key}: got {entries[key]}, expected head dim {head_dim}")
    eos = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    config = LlamaConfig(
        vocab_size=entries.get("vocab_size") or len(metadata.get("tokenizer.ggml.tokens", ())),
        hidden_size=hidden,
        intermediate_size=_get(entries, "feed_forward_length", prefix),
        num_layers=_get(entries, "block_count", prefix),
        num_heads=heads,
        num_kv_heads=entries.get("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position=_get(entries, "context_length", prefix),
        rope_theta=entries.get("rope.freq_base", 10_000.0),
        rms_norm_eps=_get(entries, "attention.layer_norm_rms_epsilon", prefix),
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
    expected = scaling_factors(inverse_frequencies(config), scaling)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise ValueError(
            f"rope_freqs.weight: got {divisors.shape} divisors up to {np.max(divisors)}, "
            f"expected {expected.shape}, those of {scaling}"
        )
    return dataclasses.replace(config, rope_scaling=scaling)


def _require_served(
    entries: Mapping[str, Any],
    served: Mapping[str, tuple[Any, ...]],
    known: Collection[str],
    prefix: str = "",
) -> None:
    """Refuse an unserved value of a key that matters, and a key nobody here knows (null is off)."""
    for key, value in entries.items():
        if key in served and value not in served[key]:
            expected = " or ".join(repr(v) for v in served[key] if v is not None) or "null"
            raise ValueError(f"{prefix}{key}: got {value!r}, expected {expected}")
        if key not in served and key not in known and value is not None:
            raise ValueError(
                f"{prefix}{key}: got {value!r}, expected no such key: "
                "it is unknown here and may change the computation"
            )


def _get(entries: Mapping[str, Any], key: str, prefix: str = "") -> Any:
    if entries.get(key) is None:
        raise ValueError(f"{prefix}{key}: got nothing, expected a value")
    return entries[key]


def _exact_quotient(hidden: Any, heads: Any) -> int:
    """Channels per head where the file does not say; both must be plain integers."""
    if not (type(hidden) is int and type(heads) is int and heads > 0 and hidden % heads == 0):
        raise ValueError(f"got {heads!r} heads, expected a divisor of hidden size {hidden!r}")
    return hidden // heads
