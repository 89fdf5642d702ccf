"""Rotary position embedding: angles of the channel pairs, with whatever scaling of frequencies.

Source: Su et al., RoFormer (arXiv 2104.09864).
"""

from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from turboquant_jax.models.config import LlamaConfig
from turboquant_jax.models.frequencies import inverse_frequencies as inverse_frequencies

Centring = Literal["pre_rope", "stored", "none"]
"""What is subtracted from the keys of a cache: their mean before RoPE, as stored, or nothing."""


def centring(config: LlamaConfig, kind: Centring = "pre_rope") -> dict[str, Any]:
    """What `CacheConfig` is told of it: the arguments `center_keys` and `rope_frequencies`."""
    known = tuple(inverse_frequencies(config).tolist()) if kind == "pre_rope" else None
    return {"center_keys": kind != "none", "rope_frequencies": known}


def rotation_angles(
    config: LlamaConfig, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Cosine and sine, float32, of every position (in tokens) times every inverse frequency.

    Both are multiplied by the attention factor of the scaling: queries and keys come out longer.
    """
    frequencies = jnp.asarray(inverse_frequencies(config), jnp.float32)
    angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None, :]
    scaling = config.rope_scaling
    if scaling is None or scaling.attention_factor == 1:
        return jnp.cos(angles), jnp.sin(angles)
    factor = jnp.float32(scaling.attention_factor)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor
