"""Rotations of few vectors: queries into the rotated space, outputs back from it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import triton
from pallas_kernels.dequantize import divide, power_of_two
from pallas_kernels.rotation import Rotation, merge, split

# Rows of a rotation that a program multiplies by, and vectors that it multiplies.
ROWS, VECTORS = 32, 32
WARPS = 2


def load_parts(refs: Any, row: jax.Array, column: jax.Array, channels: int) -> list[jax.Array]:
    """Some rows and columns of the parts of one kv head's matrix, 0 beyond the channels."""
    mask = (row < channels)[:, None] & (column < channels)[None, :]
    return [
        triton.load(refs.parts.at[part, row[:, None], column[None, :]], mask=mask, other=0.0)
        for part in range(refs.parts.shape[0])
    ]


def unrotate(
    refs: Any, parts: list[jax.Array], gain: float, y: jax.Array, row: jax.Array, channels: int
) -> jax.Array:
    """Some rows of Pi^T y, y float32 [H, columns], by the loaded columns of the parts."""
    dtype = refs.parts.dtype
    columns = 1 if dtype == jnp.float32 else 2
    operand = split(y, dtype, columns)
    out = jnp.zeros((row.shape[0], y.shape[1]), jnp.float32)
    for matrix in parts:
        out = out + merge(triton.float_dot(matrix, operand, 0, 0), columns)
    if refs.signs is None:
        return out * gain
    signs = triton.load(refs.signs.at[row], mask=row < channels, other=0.0)
    return out * (signs * gain)[:, None]


def rotate(q: Float[Array, "B N H"], rotation: Rotation, interpret: bool) -> Float[Array, "B N H"]:
    """Pi q in float32, signs included, in one kernel where XLA makes three.

    Exact products: raises ValueError unless queries and parts have one 16-bit type.
    """
    batch, heads, channels = q.shape
    if q.dtype != rotation.parts.dtype or q.dtype.itemsize != 2:
        raise ValueError(
            f"got queries of {q.dtype} and a rotation of {rotation.parts.dtype}, "
            "expected one 16-bit type"
        )
    matrices = rotation.parts.shape[1]  # one, or one for each kv head
    grouped = q.reshape(batch, matrices, heads // matrices, channels)
    of_head = triton.BlockSpec((batch, None, *grouped.shape[2:]), lambda i, j, h: (0, h, 0, 0))
    matrix = triton.BlockSpec(
        (rotation.parts.shape[0], None, channels, channels), lambda i, j, h: (0, h, 0, 0)
    )
    signs = triton.BlockSpec((channels,), lambda i, j, h: (0,))
    turned = triton.call(
        functools.partial(_rotate_kernel, gain=rotation.gain),
        grid=(-(-channels // ROWS), -(-batch * grouped.shape[2] // VECTORS), matrices),
        in_specs=(of_head, jax.tree.map(lambda x: matrix if x.ndim == 4 else signs, rotation)),
        out_specs=of_head,
        out_shape=jax.ShapeDtypeStruct(grouped.shape, jnp.float32),
        warps=WARPS,
        stages=1,
        name="rotate_queries",
        interpret=interpret,
    )(grouped, rotation)
    return turned.reshape(q.shape)


def _rotate_kernel(q: Any, rotation: Any, out: Any, *, gain: float) -> None:
    """One program of the grid (rows of the matrix, vectors, matrices)."""
    batch, heads, channels = q.shape
    channel = jnp.arange(max(16, power_of_two(channels)))
    row = triton.program_id(0) * ROWS + jnp.arange(ROWS)
    vector = triton.program_id(1) * VECTORS + jnp.arange(VECTORS)
    sequence, head = divide(vector, heads)
    exists = vector < batch * heads
    parts = load_parts(rotation, row, channel, channels)
    query = triton.load(
        q.at[sequence[:, None], head[:, None], channel[None, :]],
        mask=exists[:, None] & (channel < channels)[None, :],
        other=0.0,
    )
    if rotation.signs is not None:
        signs = triton.load(rotation.signs.at[channel], mask=channel < channels, other=0.0)
        query = query * signs.astype(query.dtype)[None, :]
    turned = jnp.zeros((VECTORS, ROWS), jnp.float32)
    for part in parts:
        turned = turned + triton.float_dot(query, part, 1, 1)
    place = out.at[sequence[:, None], head[:, None], row[None, :]]
    mask = exists[:, None] & (row < channels)[None, :]
    triton.store(place, turned * gain, mask=mask)
