"""Vectors -> indices and scales, inside a kernel: what `turboquant_jax.quantizer` defines.

Rotate, centre, normalize, nearest level, scale. The rotation is a product with a small matrix on
the tensor cores, and exact: 16-bit vectors times +-1, or times a matrix in three 16-bit parts,
summed in float32. It leaves norms as they are, so nothing is done to a vector before it; only where
one is too small, too large or not finite is it brought near 1 first, by a power of two.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import triton
from pallas_kernels.dequantize import power_of_two
from pallas_kernels.nearest import Levels, nearest

ScaleMode = Literal["norm", "matched", "least_squares", "unbiased"]
# Sums of squares between the inverse of this and this lose nothing in float32.
SAFE = 2.0**80


@dataclasses.dataclass(frozen=True)
class Code:
    """How a group of channels is quantized: ascending levels of unit variance, and the scale."""

    levels: tuple[float, ...]
    scale: ScaleMode

    @property
    def bits(self) -> int:
        """Bits of an index."""
        return (len(self.levels) - 1).bit_length()


@dataclasses.dataclass(frozen=True)
class Columns:
    """Channels of a group, padded to a power of two.

    As loaded, the padding is at the end. Once rotated, it is at the end of each eighth, so that
    codes that share a byte are a power of two of columns apart.
    """

    dim: int
    first: int

    @property
    def count(self) -> int:
        """Columns."""
        return max(16, power_of_two(self.dim))

    @property
    def within(self) -> jax.Array:
        """Position in the group of each column, as loaded."""
        return jnp.arange(self.count)

    @property
    def exists(self) -> jax.Array:
        """Which columns are channels, as loaded."""
        return self.within < self.dim

    def rotated(self, eighths: int = 8) -> tuple[jax.Array, jax.Array]:
        """Position in the group of each column once rotated, and which columns are channels."""
        size, column = self.count // 8, jnp.arange(eighths * (self.count // 8))
        if self.dim == self.count:
            return column, column < self.count
        place = column & (size - 1)
        return lax.div(column, jnp.full_like(column, size)) * (self.dim // 8) + place, (
            place < self.dim // 8
        )


def load_rotation(parts: Any, column: Columns) -> list[jax.Array]:
    """The parts [parts, 1, H, H] of a rotation, from memory."""
    at, exists = column.rotated()
    mask = exists[:, None] & column.exists[None, :] if column.dim != column.count else None
    other = None if mask is None else 0.0
    return [
        triton.load(parts.at[i, 0, at[:, None], column.within[None, :]], mask=mask, other=other)
        for i in range(parts.shape[0])
    ]


def rotate(x: jax.Array, rotation: list[jax.Array]) -> jax.Array:
    """Pi x / gain of [tokens, columns] that the parts' dtype holds exactly, in float32."""
    products = [triton.float_dot(x.astype(part.dtype), part, 1, 1) for part in rotation]
    return sum(products[1:], products[0])


def rotate_one(x: jax.Array, rotation: list[jax.Array], rows: int) -> jax.Array:
    """Pi x / gain of any float32 [columns]: rows that sum to x, of a product like all others."""
    dtype, row = rotation[0].dtype, jnp.arange(rows)[:, None]
    parts, rest = jnp.zeros((rows, x.shape[0]), jnp.float32), x
    for i in range(1 if dtype == jnp.float32 else 3):
        rounded = rest.astype(dtype).astype(jnp.float32)
        parts = jnp.where(row == i, rounded[None, :], parts)
        rest = rest - rounded
    return rotate(parts, rotation).sum(axis=0)


def quantize(
    x: jax.Array,
    mean: tuple[jax.Array, jax.Array] | None,
    rotation: list[jax.Array],
    gain: float,
    levels: Levels,
    code: Code,
    column: Columns,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Indices [tokens, columns] and scales float32 [tokens]; `turboquant_jax.quantizer`.

    `mean` is taken off: as it is, and rotated. Indices are in the low byte of an int32; what is
    above it means nothing.
    """

    def plainly() -> tuple[jax.Array, jax.Array, jax.Array]:
        return z, square, jnp.ones_like(square)

    def carefully() -> tuple[jax.Array, jax.Array, jax.Array]:
        return _scaled(x, mean, rotation, column, interpret)

    z = rotate(x, rotation)
    if mean is not None:
        z = z - mean[1][None, :]
    square = row_sum(z, z, interpret)
    unsafe = jnp.where((square > 1 / SAFE) & (square < SAFE), 0, 1)
    z, square, unit = lax.cond(unsafe.max() == 0, plainly, carefully)
    inverse = lax.rsqrt(square / column.dim)
    index, level = nearest(z, inverse, levels, interpret)
    if column.dim != column.count:
        level = jnp.where(jnp.broadcast_to(column.rotated()[1][None, :], z.shape), level, 0.0)
    scale = _scale(z, square, inverse, level, code, column, interpret)
    return index, scale * (unit * gain)


def row_sum(x: jax.Array, y: jax.Array, interpret: bool) -> jax.Array:
    """sum(x * y) along the columns."""
    pairs = list(zip(lax.split(x, (x.shape[1] // 8,) * 8, 1), lax.split(y, (x.shape[1] // 8,) * 8, 1), strict=True))
    total = pairs[0][0] * pairs[0][1]
    for a, b in pairs[1:]:
        total = triton.fma(a, b, total, interpret)
    return total.sum(axis=1)


def _scaled(
    x: jax.Array,
    mean: tuple[jax.Array, jax.Array] | None,
    rotation: list[jax.Array],
    column: Columns,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(z, its sum of squares, the length of its unit) of vectors of any magnitude.

    A vector of zeros has z = 0 and a unit of 0; one that is not finite z = 0 and a unit of NaN.
    """
    wide = x.astype(jnp.float32)
    centred = wide if mean is None else wide - mean[0][None, :]
    # NaN may be passed over here, but not by the sum of squares
    exponent = lax.bitcast_convert_type(jnp.abs(centred).max(axis=1), jnp.int32) >> 23
    exponent = jnp.minimum(jnp.maximum(exponent, 1), 253)
    grow = lax.bitcast_convert_type((254 - exponent) << 23, jnp.float32)
    shrink = lax.bitcast_convert_type(exponent << 23, jnp.float32)
    centred = centred * grow[:, None]
    exact = (centred * centred).sum(axis=1)
    finite = exact < jnp.inf
    usable = (exact > 0) & finite
    # of a vector that is not finite only its own row is spoilt
    z = rotate(wide * grow[:, None], rotation)
    if mean is not None:
        z = z - mean[1][None, :] * grow[:, None]
    z = jnp.where(jnp.broadcast_to(usable[:, None], z.shape), z, 0.0)
    square = jnp.where(usable, row_sum(z, z, interpret), 1.0)
    return z, square, jnp.where(usable, shrink, jnp.where(finite, 0.0, jnp.nan))


def _scale(
    z: jax.Array,
    square: jax.Array,
    inverse: jax.Array,
    level: jax.Array,
    code: Code,
    column: Columns,
    interpret: bool,
) -> jax.Array:
    """s / gain of the scale mode; normalized, z is z * inverse."""
    norm = square * inverse / column.dim
    if code.scale == "norm":
        return norm
    if code.scale != "unbiased":
        energy = row_sum(level, level, interpret)
        if code.scale == "matched":
            return norm * jnp.sqrt(column.dim / energy)
    overlap = row_sum(z, level, interpret)
    if code.scale == "least_squares":
        return overlap / energy
    return jnp.where(overlap > 0, square / jnp.where(overlap > 0, overlap, 1.0), norm)
