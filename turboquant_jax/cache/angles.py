"""The tables of angles that turn a mean key to its places (`pre_rope`), as numbers. No JAX."""

import numpy as np
from jaxtyping import Float

from pallas_kernels.primitives.period import PERIOD, STEPS
from turboquant_jax.cache.config import CacheConfig

WITHIN_BITS = 11
"""Most significant bits of a cosine or sine in the tables."""
FINE = 64
"""Periods of a row of the coarse table."""
COARSE = 1024
"""Most rows of it: 4,194,304 tokens."""


def angle_tables(
    config: CacheConfig, capacity: int
) -> tuple[Float[np.ndarray, "coarse H"], Float[np.ndarray, "64 H"], Float[np.ndarray, "64 H"]]:
    """Coarse, fine and within, as `pre_rope.Phases` has them, of a config with frequencies."""
    frequencies = np.zeros(config.head_dim // 2)
    known = config.rope_frequencies or ()
    frequencies[: len(known)] = known

    def table(positions: np.ndarray) -> np.ndarray:
        angles = positions[:, None] * frequencies[None, :]
        return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)

    def held(angles: np.ndarray) -> np.ndarray:
        return angles.astype(np.float16).astype(np.float32)

    rows = min(-(-capacity // (PERIOD * FINE)), COARSE)
    coarse = config.sinks + PERIOD * FINE * np.arange(rows)
    return (
        held(table(coarse) / STEPS),
        held(table(PERIOD * np.arange(FINE))),
        np.rint(STEPS * table(np.arange(PERIOD))).astype(np.float16),
    )
