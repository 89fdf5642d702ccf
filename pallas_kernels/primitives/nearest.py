"""The nearest of a code's levels, for coordinates that still have to be normalized.

A guess of the index by a smooth curve is right, or one too high: so one comparison with one
threshold decides, and the threshold and the level are looked up, not searched for. The comparison
is a saturated multiplication and addition, 0 or 1, which also normalizes: Hopper adds and
multiplies twice as fast as it compares and selects.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.primitives import triton

# Of two numbers of magnitude near 1 that are not equal, the difference times this is above 1.
STEEP = 2.0**100
# A float32 near this has an integer in its low bits.
MAGIC = 1.5 * 2.0**23
# Codes of up to so many levels are compared with every threshold.
FEW = 4
# A guess may be wrong by half a step, less what `tanh` is wrong by: 2**-11 of 128.
TOLERANCE = 0.4


@dataclasses.dataclass(frozen=True)
class Levels:
    """Levels of a code, in ascending order, and the rows of their `table`."""

    values: tuple[float, ...]
    level_table: triton.Table
    edge_table: triton.Table

    @classmethod
    def load(cls, values: tuple[float, ...], ref: Any) -> "Levels":
        """From the table in memory, inside a kernel."""
        in_lanes = len(values) <= triton.LANES
        return cls(values, *(triton.Table(ref, row, in_lanes) for row in range(2)))

    @property
    def edges(self) -> np.ndarray:
        """Thresholds, halfway between the levels."""
        return edges(self.values)


def edges(levels: tuple[float, ...]) -> np.ndarray:
    """Thresholds, halfway between the levels."""
    values = np.asarray(levels)
    return (values[1:] + values[:-1]) / 2


def table(levels: tuple[float, ...]) -> np.ndarray:
    """float32 [2, at least 32]: the levels, and the thresholds as `nearest` compares with them."""
    count = len(levels)
    rows = np.zeros((2, triton.LANES if count <= triton.LANES else 2 * count), np.float32)
    rows[0, :count] = levels
    rows[1, : count - 1] = -STEEP * edges(levels)
    if count != triton.LANES:  # guesses one too low or too high find no threshold
        rows[1, [-1, count - 1]] = STEEP**1.1, -(STEEP**1.1)
    return rows


@functools.cache
def curve(levels: tuple[float, ...]) -> tuple[float, float, float] | None:
    """(height, a, b): height * tanh(a z + b z**3) at threshold i is i - middle, nearly.

    Lloyd-Max thresholds of a normal variable lie on an error function, which is such a `tanh`. None
    where it misses one by more than the tolerance.
    """
    at = edges(levels)
    step = np.arange(len(at)) - (len(at) - 1) / 2
    height = len(levels) / 2
    if len(levels) == triton.LANES:  # no guess is out of range
        height -= 0.625
    weight = 1 - (step / height) ** 2  # slope of tanh: errors count in steps
    for powers in ((1,), (1, 3)):
        columns = np.stack([at**power for power in powers], axis=1)
        found = np.linalg.lstsq(
            weight[:, None] * columns, weight * np.arctanh(step / height), rcond=None
        )[0]
        if np.max(np.abs(height * np.tanh(columns @ found) - step)) < TOLERANCE:
            return height, float(found[0]), float(found[1]) if len(powers) > 1 else 0.0
    return None


def nearest(z: jax.Array, inverse: jax.Array, levels: Levels) -> tuple[jax.Array, jax.Array]:
    """Index and level of z [rows, columns] * inverse [rows]; a tie goes to the lower level.

    The index is an int32 as `to_int` makes it.
    """
    factor = (inverse * STEEP)[:, None]

    def above(edge: jax.Array) -> jax.Array:
        return triton.fma_saturated(z, factor, edge)

    count = len(levels.values)
    if count <= FEW:
        index, level = jnp.full(z.shape, MAGIC), jnp.full(z.shape, levels.values[0])
        for edge, step in zip(levels.edges, np.diff(levels.values), strict=True):
            passed = above(jnp.full((1, 1), -STEEP * edge, jnp.float32))
            index = index + passed
            level = triton.fma(passed, jnp.full((1, 1), step, jnp.float32), level)
        return lax.bitcast_convert_type(index, jnp.int32), level
    found = curve(levels.values)
    if found is None:
        index = jnp.full(z.shape, MAGIC)
        for bit in reversed(range((count - 1).bit_length())):
            at = lax.bitcast_convert_type(index, jnp.int32) + (2**bit - 1)
            index = triton.fma(above(levels.edge_table[at]), jnp.full((1, 1), 2.0**bit), index)
    else:
        height, linear, cubic = found
        if cubic:
            unit = z * inverse[:, None]
            slope = triton.fma(unit * unit, jnp.full((1, 1), cubic), jnp.full((1, 1), linear))
            guess = triton.tanh(unit * slope)
        else:
            guess = triton.tanh(z * (inverse * linear)[:, None])
        guess = triton.fma(
            guess, jnp.full((1, 1), height), jnp.full((1, 1), MAGIC + (count - 2) / 2)
        )
        index = guess + above(levels.edge_table[lax.bitcast_convert_type(guess, jnp.int32)])
    index = lax.bitcast_convert_type(index, jnp.int32)
    return index, levels.level_table[index]


def to_int(x: jax.Array) -> jax.Array:
    """int32 whose low bits are the integer in a float32 of magnitude below 2**22; faster than to
    convert."""
    return lax.bitcast_convert_type(x + MAGIC, jnp.int32)


def to_float(x: jax.Array) -> jax.Array:
    """The inverse of `to_int`."""
    return lax.bitcast_convert_type(x, jnp.float32) - MAGIC


def bits_of(index: jax.Array, first: int, count: int) -> jax.Array:
    """Some bits of what `to_int` made, as if it had made that."""
    magic = np.float32(MAGIC).view(np.int32).item()
    return ((index >> first) & (2**count - 1)) | magic
