"""Vectors -> indices and scales, inside a kernel: what `turboquant_jax.quantizer` defines.

Rotate, centre, normalize, nearest level, scale. The rotation is a product with a small matrix on
the tensor cores, and exact: 16-bit vectors times +-1, or times a matrix in three 16-bit parts,
summed in float32. It leaves norms as they are, so nothing is done to a vector before it; only where
one is too small, too large or not finite is it brought near 1 first, by a power of two.
"""

import dataclasses
from collections.abc import Callable
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
    vectors: Callable[[], jax.Array],
    means: Callable[[], tuple[jax.Array, jax.Array]] | None,
    rotation: list[jax.Array],
    gain: float,
    levels: Levels,
    code: Code,
    column: Columns,
    interpret: bool,
) -> tuple[list[jax.Array], jax.Array]:
    """Indices [tokens, an eighth of the columns], 8 of them, and scales float32 [tokens].

    See `turboquant_jax.quantizer`. `vectors` loads [tokens, columns]; of `means`, the vector to take
    off, as it is and rotated. Both are loaded again where they are needed again, which is rare.
    Indices are in the low byte of an int32; what is above it means nothing.
    """
    z = rotate(vectors(), rotation)
    if means is not None:
        z = z - means()[1][None, :]
    square = _length(z, interpret)
    unsafe = jnp.where((square > 1 / SAFE) & (square < SAFE), 0, 1)
    z, square, unit = lax.cond(
        unsafe.max() == 0,
        lambda: (z, square, jnp.ones_like(square)),
        lambda: _scaled(vectors(), means and means(), rotation, interpret),
    )
    inverse = lax.rsqrt(square / column.dim)
    exists = column.rotated(1)[1]
    indices, energy, overlap = {}, None, None
    # one eighth after the other, so that no more than one is in the making at a time
    pieces = eighths(z)
    for i in (0, 4, 2, 6, 1, 5, 3, 7):
        indices[i], level = nearest(pieces[i], inverse, levels, interpret)
        if column.dim != column.count:
            level = jnp.where(jnp.broadcast_to(exists[None, :], level.shape), level, 0.0)
        energy = _add_product(energy, level, level, interpret)
        overlap = _add_product(overlap, pieces[i], level, interpret)
    scale = _scale(code.scale, square, inverse, energy, overlap, column.dim)
    return [indices[i] for i in range(8)], scale * (unit * gain)


def eighths(x: jax.Array) -> list[jax.Array]:
    """Eighths of the columns."""
    return lax.split(x, (x.shape[1] // 8,) * 8, 1)


def _add_product(
    total: jax.Array | None, x: jax.Array, y: jax.Array, interpret: bool
) -> jax.Array:
    """total + x * y, where no total is 0."""
    return x * y if total is None else triton.fma(x, y, total, interpret)


def _length(z: jax.Array, interpret: bool) -> jax.Array:
    """Sums of squares of the rows."""
    total = None
    for piece in eighths(z):
        total = _add_product(total, piece, piece, interpret)
    return total.sum(axis=1)


def _scaled(
    x: jax.Array,
    means: tuple[jax.Array, jax.Array] | None,
    rotation: list[jax.Array],
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(z, its sum of squares, its unit) of vectors of any magnitude.

    A vector of zeros has z = 0 and a unit of 0; one that is not finite z = 0 and a unit of NaN.
    """
    wide = x.astype(jnp.float32)
    centred = wide if means is None else wide - means[0][None, :]
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
    if means is not None:
        z = z - means[1][None, :] * grow[:, None]
    z = jnp.where(jnp.broadcast_to(usable[:, None], z.shape), z, 0.0)
    square = jnp.where(usable, _length(z, interpret), 1.0)
    return z, square, jnp.where(usable, shrink, jnp.where(finite, 0.0, jnp.nan))


def _scale(
    mode: ScaleMode,
    square: jax.Array,
    inverse: jax.Array,
    energy: jax.Array,
    overlap: jax.Array,
    dim: int,
) -> jax.Array:
    """s / gain, of z that were not normalized: square = <z, z>, <level, level>, <z, level>."""
    norm = square * inverse / dim
    if mode == "norm":
        return norm
    if mode == "matched":
        return norm * jnp.sqrt(dim / energy.sum(axis=1))
    overlap = overlap.sum(axis=1)
    if mode == "least_squares":
        return overlap / energy.sum(axis=1)
    return jnp.where(overlap > 0, square / jnp.where(overlap > 0, overlap, 1.0), norm)
