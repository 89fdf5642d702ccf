"""`LlamaConfig` from a Hugging Face `config.json`, whose keys `huggingface_keys` knows."""

from collections.abc import Mapping
from typing import Any

from turboquant_jax.models.config import LlamaConfig
from turboquant_jax.models.huggingface_keys import (
    HF_NEUTRAL,
    HF_READ,
    HF_ROPE,
    HF_SERVED,
    MODEL_TYPES,
)
from turboquant_jax.models.rope_scaling import (
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    YarnScaling,
    require_positive,
    yarn_attention_factor,
)
from turboquant_jax.models.strict_keys import exact_quotient, get, require_served, require_wide


def config_from_huggingface(entries: Mapping[str, Any]) -> LlamaConfig:
    """Read the object of a `config.json`, of transformers 4 or 5.

    An absent key has the default of the model type's class in transformers.

    Raises:
      ValueError: an architecture that is not served, or a key that is not, or is not known.
    """
    kind = MODEL_TYPES.get(str(entries.get("model_type")))
    if kind is None:
        got = repr(entries["model_type"]) if "model_type" in entries else "nothing"
        raise ValueError(f"model_type: got {got}, expected {' or '.join(map(repr, MODEL_TYPES))}")
    require_served(entries, {**HF_SERVED, **kind.served}, HF_READ | HF_NEUTRAL)
    entries = {**kind.defaults, **entries}
    heads, hidden = get(entries, "num_attention_heads"), get(entries, "hidden_size")
    theta, scaling = _rope(entries)
    eos = entries.get("eos_token_id")
    return LlamaConfig(
        vocab_size=get(entries, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=get(entries, "intermediate_size"),
        num_layers=get(entries, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=entries.get("num_key_value_heads") or heads,
        head_dim=entries.get("head_dim") or exact_quotient(hidden, heads),
        max_position=get(entries, "max_position_embeddings"),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=get(entries, "rms_norm_eps"),
        tie_embeddings=bool(entries.get("tie_word_embeddings", False)),
        bos_id=entries.get("bos_token_id"),
        eos_ids=() if eos is None else tuple(eos if isinstance(eos, list) else [eos]),
        qkv_bias=kind.qkv_bias or bool(entries.get("attention_bias")),
        o_bias=kind.o_bias and bool(entries.get("attention_bias")),
        mlp_bias=bool(entries.get("mlp_bias")),
        qk_norm=kind.qk_norm,
        sliding_window=_window(entries, kind.window),
    )


def _window(entries: Mapping[str, Any], rule: str | None) -> int | None:
    """Tokens that a query sees, if they are fewer than the context; of all layers, or of none."""
    for key in ("num_hidden_layers", "max_position_embeddings"):
        require_positive(key, get(entries, key), whole=True)
    window, layers = entries.get("sliding_window"), entries["num_hidden_layers"]
    if rule is None:
        require_wide(entries, "sliding_window", "max_position_embeddings")
        window = None
    elif rule == "use_sliding_window" and not entries.get(rule):
        window = None
    elif window is not None:
        require_positive("sliding_window", window, whole=True)
    kinds = entries.get("layer_types")
    if kinds is None:
        full = layers if window is None else 0
        if rule == "use_sliding_window" and window is not None:
            full = sum(layer < get(entries, "max_window_layers") for layer in range(layers))
        kinds = ["full_attention"] * full + ["sliding_attention"] * (layers - full)

    def all_are(kind: str) -> bool:
        return isinstance(kinds, list) and all(each == kind for each in kinds)

    if all_are("full_attention") and (window is None or rule == "use_sliding_window"):
        return None
    if window is None or not all_are("sliding_attention"):
        raise ValueError(
            f"layer_types: got {kinds!r}, expected one kind for all layers, which fits "
            f"a sliding_window of {window!r}: windows by layer are not served"
        )
    return window if window < entries["max_position_embeddings"] else None


def _rope(entries: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling: `rope_theta` beside `rope_scaling`, or both inside `rope_parameters`."""
    key = "rope_parameters" if entries.get("rope_parameters") else "rope_scaling"
    rope = entries.get(key) or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"{key}: got {rope!r}, expected an object")
    theta = rope.get("rope_theta", entries.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in HF_ROPE:
        served = " or ".join(map(repr, HF_ROPE))
        raise ValueError(f"{key}.rope_type: got {kind!r}, expected {served}")
    known = {"rope_theta", "rope_type", "type", *HF_ROPE[kind]}
    require_served(rope, {"partial_rotary_factor": (None, 1)}, known, prefix=key + ".")
    if kind == "default":
        return theta, None
    factor, original = get(rope, "factor", key + "."), "original_max_position_embeddings"
    require_positive(f"{key}.factor", factor)
    if kind == "linear":
        return theta, LinearScaling(factor)
    if kind == "llama3":
        return theta, Llama3Scaling(
            factor=factor,
            low_freq_factor=get(rope, "low_freq_factor", key + "."),
            high_freq_factor=get(rope, "high_freq_factor", key + "."),
            original_max_position=get(rope, original, key + "."),
        )
    attention = rope.get("attention_factor")
    if attention is None:
        scales = rope.get("mscale"), rope.get("mscale_all_dim")
        attention = yarn_attention_factor(factor, *scales)
    return theta, YarnScaling(
        factor=factor,
        original_max_position=rope.get(original) or get(entries, "max_position_embeddings"),
        attention_factor=attention,
        beta_fast=rope.get("beta_fast") or 32.0,
        beta_slow=rope.get("beta_slow") or 1.0,
        truncate=bool(rope.get("truncate", True)),
    )
