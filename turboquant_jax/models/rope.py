"""Rotary position embedding: rotate halves, with and without Llama-3's frequency scaling.

Source: Su et al., RoFormer (arXiv 2104.09864); the scaling follows Meta's Llama 3.1 release.
"""

import math
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from turboquant_jax.models.config import Llama3Scaling, LlamaConfig

Centring = Literal["pre_rope", "stored", "none"]
"""What is subtracted from the keys of a cache: their mean before RoPE, as stored, or nothing."""


def centring(config: LlamaConfig, kind: Centring = "pre_rope") -> dict[str, Any]:
    """What `CacheConfig` is told of it: the arguments `center_keys` and `rope_frequencies`."""
    known = tuple(inverse_frequencies(config).tolist()) if kind == "pre_rope" else None
    return {"center_keys": kind != "none", "rope_frequencies": known}


def inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians per position of each channel pair: float64 [H/2], `theta**(-2i/H)`, or scaled."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    return frequencies if scaling is None else frequencies / scaling_factors(frequencies, scaling)


def scaling_factors(frequencies: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    """The divisor of each inverse frequency under Llama-3 scaling: [H/2] in, [H/2] out.

    A pair that turns more than `high_freq_factor` times within the original context keeps its
    frequency, one that turns less than `low_freq_factor` times is slowed by `factor`, and between
    the two the frequency (not its divisor) is interpolated linearly in the number of turns.
    """
    turns = scaling.original_max_position * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / (kept + (1.0 - kept) / scaling.factor)


def rotation_angles(
    config: LlamaConfig, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Cosine and sine, float32, of every position (in tokens) times every inverse frequency."""
    frequencies = jnp.asarray(inverse_frequencies(config), jnp.float32)
    angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)
