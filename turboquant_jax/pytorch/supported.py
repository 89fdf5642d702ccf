"""Models, dtypes and versions that are served, and one clear error for all others."""

import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from turboquant_jax.cache.config import CacheConfig
from turboquant_jax.cache.presets import Preset
from turboquant_jax.cache.presets import preset as preset_config
from turboquant_jax.models.frequencies import inverse_frequencies
from turboquant_jax.models.huggingface_config import config_from_huggingface

if TYPE_CHECKING:
    from turboquant_jax.pytorch.huggingface import TurboQuantCache

MODELS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
"""Decoders of transformers by the name of their class, alone or below a head."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TRANSFORMERS = (5,)
"""Major versions."""
TORCH = (2, 9)
"""The oldest version."""
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What transformers calls a cache, as an argument and in an output: "cache" since 5.24."""


def check_versions() -> None:
    """ImportError unless torch and transformers are of versions that are served."""
    major = int(transformers.__version__.split(".")[0])
    if major not in TRANSFORMERS:
        raise ImportError(f"transformers: got {transformers.__version__}, expected 5.x")
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < TORCH:
        raise ImportError(f"torch: got {torch.__version__}, expected 2.9 or newer")


def decoder(model: Any) -> Any:
    """The decoder of a model.

    Raises:
      ValueError: a model that is not served; says which are.
    """
    found = getattr(model, "base_model", model)
    if type(found).__name__ not in MODELS:
        served = ", ".join(name.removesuffix("Model") for name in MODELS)
        raise ValueError(f"model: got {type(model).__name__}, expected one of {served}")
    return found


def attention_modules(model: Any) -> tuple[Any, ...]:
    """Weak references to the attention of every layer."""
    return tuple(weakref.ref(layer.self_attn) for layer in decoder(model).layers)


def cache_config(model: Any, preset: Preset = "lossless") -> CacheConfig:
    """The configuration of a preset for a model: its sizes, RoPE, dtype and sliding window.

    Raises:
      ValueError: a model, or a part of its description, that is not served.
    """
    own = decoder(model)
    described = config_from_huggingface(own.config.to_dict())
    frequencies = tuple(inverse_frequencies(described).tolist())
    dim = described.head_dim
    found = preset_config(preset, described.num_layers, described.num_kv_heads, dim, frequencies)
    if dim & (dim - 1):  # no Hadamard rotation: as `rotation.default_kind` has it
        key, value = (replace(codec, rotation="haar") for codec in (found.key, found.value))
        found = replace(found, key=key, value=value)
    dtype = dtype_of(own)
    return replace(found, dtype=str(dtype)[6:], sliding_window=described.sliding_window)


def dtype_of(model: Any) -> torch.dtype:
    """The dtype of a model.

    Raises:
      ValueError: one that is not served.
    """
    if model.dtype not in DTYPES:
        served = ", ".join(str(dtype)[6:] for dtype in DTYPES)
        raise ValueError(
            f"dtype of the model: got {str(model.dtype)[6:]}, expected one of {served}"
        )
    return model.dtype


def check_config(model: Any, config: CacheConfig) -> None:
    """ValueError unless a configuration fits a model."""
    expected = cache_config(model)
    for name in ("num_layers", "num_kv_heads", "head_dim", "sliding_window"):
        if getattr(config, name) != getattr(expected, name):
            got = getattr(config, name)
            raise ValueError(f"{name}: got {got}, expected the model's {getattr(expected, name)}")
    if config.rope_frequencies not in (None, expected.rope_frequencies):
        raise ValueError("rope_frequencies: got others, expected the model's, or None")


def check_call(
    cache: "TurboQuantCache", module: Any, layer: int, dropout: float, mask: Tensor | None
) -> None:
    """ValueError unless a call of attention is of the cache's model and of a served kind."""
    if cache.modules[layer]() is not module:
        raise ValueError(
            "model: got another one than the cache was made for, expected "
            f"TurboQuantCache.from_model of this {type(module).__name__.removesuffix('Attention')}"
        )
    if dropout:
        raise ValueError(f"dropout: got {dropout}, expected 0: the cache serves inference")
    if mask is not None and mask.dim() != 2:
        raise ValueError(
            f"attention_mask: got {mask.dim()} dimensions, expected 2, [batch, tokens], or None"
        )
