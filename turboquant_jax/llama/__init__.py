"""Llama-family decoders: configuration, model, weights, tokenizers and generation."""

from turboquant_jax.llama.checkpoint import Checkpoint, load
from turboquant_jax.llama.config import Llama3Scaling, LlamaConfig, parameter_count
from turboquant_jax.llama.model import Attend, Llama
from turboquant_jax.llama.presets import PRESETS

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
