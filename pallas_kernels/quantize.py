"""Vectors -> indices and scales, inside a kernel: what `turboquant_jax.quantizer` defines.

Normalize, rotate, nearest level, scale. The rotation is a product with a small matrix on the tensor
cores, and exact: 16-bit vectors times +-1, or times a matrix in three 16-bit parts, summed in
float32. Vectors are first brought near 1 by a power of two, which rounds nothing.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import triton
from pallas_kernels.dequantize import power_of_two
from pallas_kernels.rotation import Rotation

ScaleMode = Literal["norm", "matched", "least_squares", "unbiased"]
# Levels of codes up to here are constants of the program, chosen by selects; others are looked up.
SELECTED = 16


@dataclasses.dataclass(frozen=True)
class Code:
    """How a group of channels is quantized: ascending levels of unit variance, and the scale."""

    levels: tuple[float, ...]
    scale: ScaleMode

    @property
    def bits(self) -> int:
        """Bits of an index."""
        return (len(self.levels) - 1).bit_length()

    @property
    def edges(self) -> tuple[float, ...]:
        """Thresholds, halfway between the levels."""
        return tuple((a + b) / 2 for a, b in zip(self.levels, self.levels[1:], strict=False))


@dataclasses.dataclass(frozen=True)
class Columns:
    """Channels of a group, padded to a power of two."""

    dim: int
    first: int

    @property
    def count(self) -> int:
        """Columns."""
        return max(16, power_of_two(self.dim))

    @property
    def within(self) -> jax.Array:
        """Position in the group of each column."""
        return jnp.arange(self.count)

    @property
    def channel(self) -> jax.Array:
        """The channel of each column in a whole vector."""
        return self.first + self.within

    @property
    def exists(self) -> jax.Array:
        """Which columns are channels."""
        return self.within < self.dim


def quantize(
    x: jax.Array,
    mean: jax.Array | None,
    rotation: Rotation,
    table: Any,
    code: Code,
    column: Columns,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Indices int32 [tokens, columns] and scales float32 [tokens]; `turboquant_jax.quantizer`."""
    wide = x.astype(jnp.float32)
    centred = wide if mean is None else wide - mean[None, :]
    # NaN may be passed over here, but not by the sum of squares
    exponent = lax.bitcast_convert_type(jnp.abs(centred).max(axis=1), jnp.int32) >> 23
    exponent = jnp.minimum(jnp.maximum(exponent, 1), 253)
    grow = lax.bitcast_convert_type((254 - exponent) << 23, jnp.float32)
    shrink = lax.bitcast_convert_type(exponent << 23, jnp.float32)
    centred = centred * grow[:, None]
    square = (centred * centred).sum(axis=1) / column.dim
    usable = (square > 0) & (square < jnp.inf)
    root = jnp.sqrt(jnp.where(usable, square, 1.0))
    # of a vector that is not finite only its own row is spoilt
    parts = _parts(rotation, column)
    z = _rotate(wide * grow[:, None], parts)
    factor = rotation.gain / root
    z = z * factor[:, None]
    if mean is not None:
        z = triton.fma(_rotate_one(mean, parts)[None, :], -(grow * factor)[:, None], z, interpret)
    index, level = _nearest(z, table, code)
    if column.count != column.dim:
        level = jnp.where(jnp.broadcast_to(column.exists[None, :], z.shape), level, 0.0)
    norm = jnp.where(square == 0, 0.0, jnp.where(usable, root * shrink, jnp.nan))
    return index, norm * _correction(z, level, code, column)


def _rotate(x: jax.Array, parts: list[jax.Array]) -> jax.Array:
    """Pi x / gain of float32 [tokens, columns] that the parts' dtype holds exactly."""
    products = [triton.float_dot(x.astype(part.dtype), part, 1, 1) for part in parts]
    return sum(products[1:], products[0])


def _rotate_one(x: jax.Array, parts: list[jax.Array]) -> jax.Array:
    """Pi x / gain of any float32 [columns]: a few rows, that sum to x, of a product."""
    row = jnp.arange(16)[:, None]
    rows, rest = jnp.zeros((16, x.shape[0]), jnp.float32), x
    for i in range(1 if parts[0].dtype == jnp.float32 else 3):
        rounded = rest.astype(parts[0].dtype).astype(jnp.float32)
        rows = jnp.where(row == i, rounded[None, :], rows)
        rest = rest - rounded
    return _rotate(rows, parts).sum(axis=0)


def _parts(rotation: Rotation, column: Columns) -> list[jax.Array]:
    at, exists = column.within, column.exists
    mask = exists[:, None] & exists[None, :]
    matrix: Any = rotation.parts  # inside the kernel, a reference
    return [
        triton.load(matrix.at[i, 0, at[:, None], at[None, :]], mask=mask, other=0.0)
        for i in range(matrix.shape[0])
    ]


def _nearest(z: jax.Array, table: Any, code: Code) -> tuple[jax.Array, jax.Array]:
    """Index and level of each coordinate; a tie goes to the lower level."""
    if len(code.levels) > SELECTED:
        index = jnp.zeros(z.shape, jnp.int32)
        for bit in reversed(range(code.bits)):
            edge = triton.load(table.at[1, index + (2**bit - 1)])
            index = index + jnp.where(z > edge, 2**bit, 0)
        return index, triton.load(table.at[0, index])
    if any(a != -b for a, b in zip(code.levels, reversed(code.levels), strict=True)):
        return _search(z, code.levels, code.edges)
    # half of the work where the levels are symmetric
    half = len(code.levels) // 2
    index, level = _search(jnp.abs(z), code.levels[half:], code.edges[half:])
    above = z > 0
    index = jnp.where(above, index + half, half - 1 - index)
    return index, jnp.where(above, level, -level)


def _search(
    z: jax.Array, levels: tuple[float, ...], edges: tuple[float, ...]
) -> tuple[jax.Array, jax.Array]:
    """By halves, among a power of two of levels that are spelt out in the code."""
    if not edges:
        return jnp.zeros(z.shape, jnp.int32), jnp.full(z.shape, levels[0], jnp.float32)
    passed: list[jax.Array] = []

    def choose(values: tuple[float, ...]) -> Any:
        """The value at the position that the comparisons so far lead to."""
        chosen: list[Any] = list(values)
        for above in reversed(passed):
            chosen = [
                jnp.where(above, high, low)
                for low, high in zip(chosen[::2], chosen[1::2], strict=True)
            ]
        return chosen[0]

    size, index = len(levels), jnp.zeros(z.shape, jnp.int32)
    while size > 1:
        above = z > choose(edges[size // 2 - 1 :: size])
        size //= 2
        passed.append(above)
        index = index + jnp.where(above, size, 0)
    level = choose(levels)
    return index, level.astype(jnp.float32)


def _correction(z: jax.Array, level: jax.Array, code: Code, column: Columns) -> jax.Array:
    """s sqrt(d) / |x| of the scale mode."""
    if code.scale == "norm":
        return jnp.ones(z.shape[:1], jnp.float32)
    energy = (level * level).sum(axis=1)
    if code.scale == "matched":
        return jnp.sqrt(column.dim / energy)
    overlap = (z * level).sum(axis=1)
    if code.scale == "least_squares":
        return overlap / energy
    return jnp.where(overlap > 0, column.dim / jnp.where(overlap > 0, overlap, 1.0), 1.0)
