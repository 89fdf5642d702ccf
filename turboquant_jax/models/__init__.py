"""Llama-family decoders: configuration, model, weights, tokenizers and generation."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same names for type checkers
    from turboquant_jax.models.checkpoint import Checkpoint, load
    from turboquant_jax.models.config import LlamaConfig, parameter_count
    from turboquant_jax.models.model import Attend, Llama
    from turboquant_jax.models.presets import PRESETS
    from turboquant_jax.models.rope_scaling import LinearScaling, Llama3Scaling, YarnScaling
else:
    from turboquant_jax import lazy

    _NAMES = {
        "PRESETS": ("turboquant_jax.models.presets", "PRESETS"),
        "Attend": ("turboquant_jax.models.model", "Attend"),
        "Checkpoint": ("turboquant_jax.models.checkpoint", "Checkpoint"),
        "Llama": ("turboquant_jax.models.model", "Llama"),
        "LinearScaling": ("turboquant_jax.models.rope_scaling", "LinearScaling"),
        "Llama3Scaling": ("turboquant_jax.models.rope_scaling", "Llama3Scaling"),
        "LlamaConfig": ("turboquant_jax.models.config", "LlamaConfig"),
        "YarnScaling": ("turboquant_jax.models.rope_scaling", "YarnScaling"),
        "load": ("turboquant_jax.models.checkpoint", "load"),
        "parameter_count": ("turboquant_jax.models.config", "parameter_count"),
    }
    __getattr__, __dir__ = lazy.names(__name__, _NAMES)

__all__ = [
    "PRESETS",
    "Attend",
    "Checkpoint",
    "LinearScaling",
    "Llama",
    "Llama3Scaling",
    "LlamaConfig",
    "YarnScaling",
    "load",
    "parameter_count",
]
