"""Llama-family decoders: configuration, model, weights, tokenizers and generation."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same names for type checkers
    from turboquant_jax.models.checkpoint import Checkpoint, load
    from turboquant_jax.models.config import Llama3Scaling, LlamaConfig, parameter_count
    from turboquant_jax.models.model import Attend, Llama
    from turboquant_jax.models.presets import PRESETS
else:
    from turboquant_jax import lazy

    _NAMES = {
        "PRESETS": ("turboquant_jax.models.presets", "PRESETS"),
        "Attend": ("turboquant_jax.models.model", "Attend"),
        "Checkpoint": ("turboquant_jax.models.checkpoint", "Checkpoint"),
        "Llama": ("turboquant_jax.models.model", "Llama"),
        "Llama3Scaling": ("turboquant_jax.models.config", "Llama3Scaling"),
        "LlamaConfig": ("turboquant_jax.models.config", "LlamaConfig"),
        "load": ("turboquant_jax.models.checkpoint", "load"),
        "parameter_count": ("turboquant_jax.models.config", "parameter_count"),
    }
    __getattr__, __dir__ = lazy.names(__name__, _NAMES)

__all__ = [
    "PRESETS",
    "Attend",
    "Checkpoint",
    "Llama",
    "Llama3Scaling",
    "LlamaConfig",
    "load",
    "parameter_count",
]
