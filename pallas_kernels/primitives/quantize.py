"""Vectors -> indices and scales, inside a kernel: what the quantizer defines.

Rotate, centre, normalize, nearest level, scale. The rotation is a product with a small matrix on
the tensor cores, and exact: 16-bit vectors times +-1, or times a matrix in three 16-bit parts,
summed in float32. It leaves norms as they are, so nothing is done to a vector before it; only where
one is too small, too large or not finite is it brought near 1 first, by a power of two.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels.primitives import triton
from pallas_kernels.primitives.nearest import Levels, nearest
from pallas_kernels.primitives.tile import Columns, Tile

ScaleMode = Literal["norm", "matched", "least_squares", "unbiased"]
# Sums of squares between the inverse of this and this lose nothing in float32.
SAFE = 2.0**80
# Columns of a product at least.
FEW_COLUMNS = 16


@dataclasses.dataclass(frozen=True)
class CodeOperand:
    """How a group of channels is quantized: ascending levels of unit variance, and the scale."""

    levels: tuple[float, ...]
    scale: ScaleMode

    @property
    def bits(self) -> int:
        """Bits of an index."""
        return (len(self.levels) - 1).bit_length()


@dataclasses.dataclass(frozen=True)
class Rotated:
    """Rotated vectors z [tokens, columns] over their unit [tokens], and sums of their squares."""

    z: jax.Array
    square: jax.Array
    unit: jax.Array


def rotated(tile: Tile, rotation: list[list[jax.Array]]) -> Rotated:
    """Vectors as they come. Those whose square is not `safe` have to be `scaled` first."""
    pieces = zip(tile.all_centred(), rotation, strict=True)
    products = [product for x, own in pieces for product in _products(x, own)]
    z = sum(products[1:], products[0])
    if tile.has_rotated_mean:
        z = z - tile.rotated_mean()[None, :]
    square = _length(z)
    return Rotated(z, square, jnp.ones_like(square))


def unsafe(rotated: Rotated) -> Int[Array, " tokens"]:
    """1 where the sum of squares lost something, else 0."""
    square = rotated.square
    return jnp.where((square > 1 / SAFE) & (square < SAFE), 0, 1)


def quantize(
    rotated: Rotated, column: Columns, gain: float, levels: Levels, code: CodeOperand
) -> tuple[list[jax.Array], jax.Array]:
    """Indices [tokens, an eighth of the columns], 8 of them, and scales float32 [tokens].

    See `turboquant_jax.quantizers.quantizer`. Indices are in the low byte of an int32; what is
    above it means nothing.
    """
    square = rotated.square
    inverse = lax.rsqrt(square / column.dim)
    exists = column.rotated(1)[1]
    pieces, indices = eighths(rotated.z), {}
    energy = overlap = jnp.zeros(pieces[0].shape, jnp.float32)
    # eighths whose codes share a byte one after the other, so that few wait in registers
    for i in (0, 4, 2, 6, 1, 5, 3, 7):
        indices[i], level = nearest(pieces[i], inverse, levels)
        if column.dim != column.count:
            level = jnp.where(jnp.broadcast_to(exists[None, :], level.shape), level, 0.0)
        energy = triton.fma(level, level, energy)
        overlap = triton.fma(pieces[i], level, overlap)
    scale = _scale(code.scale, square, inverse, energy, overlap, column.dim)
    return [indices[i] for i in range(8)], scale * (rotated.unit * gain)


def _products(x: jax.Array, rotation: list[jax.Array]) -> list[jax.Array]:
    """Vectors times the parts of a rotation, whose dtype holds them exactly, in float32."""
    return [triton.float_dot(x.astype(part.dtype), part, 1, 1) for part in rotation]


def eighths(x: jax.Array) -> list[jax.Array]:
    """Eighths of the columns."""
    return list(lax.split(x, (x.shape[1] // 8,) * 8, 1))


def _length(z: jax.Array) -> jax.Array:
    """Sums of squares of the rows."""
    pieces = eighths(z)
    total = pieces[0] * pieces[0]
    for piece in pieces[1:]:
        total = triton.fma(piece, piece, total)
    return total.sum(axis=1)


def scaled(tile: Tile) -> Rotated:
    """Vectors of any magnitude, each brought near 1 by a power of two.

    A vector of zeros has z = 0 and a unit of 0; one that is not finite z = 0 and a unit of NaN. A
    few columns at a time: this is rare, but its registers are taken from all programs.
    """
    column, rows = tile.column, tile.token.shape[0]

    def load(i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Columns, what is rotated there, and the vectors less their mean."""
        first = i + triton.hidden_zero(i) if tile.has_turned_mean else i
        within = first * FEW_COLUMNS + jnp.arange(FEW_COLUMNS)
        wide = tile.centred(within).astype(jnp.float32)
        return within, wide, wide - tile.mean(within)[None, :] if tile.has_rotated_mean else wide

    def find_largest(i: jax.Array, largest: jax.Array) -> jax.Array:
        return jnp.maximum(largest, jnp.abs(load(i)[2]).max(axis=1))

    def add(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        square, z = carry
        within, wide, centred = load(i)
        centred = centred * grow[:, None]
        # of a vector that is not finite only its own row is spoilt
        z = sum(_products(wide * grow[:, None], tile.rotation(within)), z)
        return square + (centred * centred).sum(axis=1), z

    zero, turns = jnp.zeros(rows, jnp.float32), column.count // FEW_COLUMNS
    # NaN may be passed over here, but not by the sum of squares
    largest = triton.rare_loop(turns, find_largest, zero)
    exponent = lax.bitcast_convert_type(largest, jnp.int32) >> 23
    exponent = jnp.minimum(jnp.maximum(exponent, 1), 253)
    grow = lax.bitcast_convert_type((254 - exponent) << 23, jnp.float32)
    shrink = lax.bitcast_convert_type(exponent << 23, jnp.float32)
    start = zero, jnp.zeros((rows, column.count), jnp.float32)
    square, z = triton.rare_loop(turns, add, start)
    if tile.has_rotated_mean:
        z = z - tile.rotated_mean()[None, :] * grow[:, None]
    finite = square < jnp.inf
    usable = (square > 0) & finite
    z = jnp.where(jnp.broadcast_to(usable[:, None], z.shape), z, 0.0)
    square = jnp.where(usable, _length(z), 1.0)
    return Rotated(z, square, jnp.where(usable, shrink, jnp.where(finite, 0.0, jnp.nan)))


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
