"""Rotations of few vectors: queries into the rotated space, outputs back from it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import triton
from pallas_kernels.dequantize import power_of_two
from pallas_kernels.rotation import Rotation, merge, split

WARPS = 4


def load_parts(refs: Any, rows: int, channels: int) -> list[jax.Array]:
    """The parts [rows, rows] of one kv head's matrix, 0 beyond the channels."""
    row = jnp.arange(rows)
    mask = (row < channels)[:, None] & (row < channels)[None, :]
    return [
        triton.load(refs.parts.at[part, row[:, None], row[None, :]], mask=mask, other=0.0)
        for part in range(refs.parts.shape[0])
    ]


def unrotate(
    refs: Any, parts: list[jax.Array], gain: float, y: jax.Array, channels: int
) -> jax.Array:
    """Pi^T y of float32 [H, columns], by the loaded parts of one kv head."""
    dtype = refs.parts.dtype
    columns = 1 if dtype == jnp.float32 else 2
    operand = split(y, dtype, columns)
    out = jnp.zeros(y.shape, jnp.float32)
    for matrix in parts:
        out = out + merge(triton.float_dot(matrix, operand, 0, 0), columns)
    if refs.signs is None:
        return out * gain
    row = jnp.arange(y.shape[0])
    signs = triton.load(refs.signs.at[row], mask=row < channels, other=0.0)
    return out * (signs * gain)[:, None]


def rotate(
    q: Float[Array, "B N H"], rotation: Rotation, kv_heads: int, interpret: bool
) -> Float[Array, "B N H"]:
    """Pi q in float32, signs included, in one kernel where XLA makes three.

    Exact products: raises ValueError unless queries and parts have one 16-bit type.
    """
    batch, heads, channels = q.shape
    if q.dtype != rotation.parts.dtype or q.dtype.itemsize != 2:
        raise ValueError(
            f"got queries of {q.dtype} and a rotation of {rotation.parts.dtype}, "
            "expected one 16-bit type"
        )
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, channels)
    shared = rotation.parts.shape[1] == 1
    of_head = triton.BlockSpec((None, None, *grouped.shape[2:]), lambda h, j: (j, h, 0, 0))
    matrix = triton.BlockSpec(
        (rotation.parts.shape[0], None, channels, channels),
        lambda h, j: (0, 0 if shared else h, 0, 0),
    )
    signs = triton.BlockSpec((channels,), lambda h, j: (0,))
    turned = triton.call(
        functools.partial(_rotate_kernel, gain=rotation.gain),
        grid=(kv_heads, batch),
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
    """One program of the grid (kv head, sequence); channels on the rows of the product."""
    heads, channels = q.shape
    channel, head = jnp.arange(max(16, power_of_two(channels))), jnp.arange(8 if heads <= 8 else 16)
    exists = (head < heads)[:, None] & (channel < channels)[None, :]
    query = triton.load(q.at[head[:, None], channel[None, :]], mask=exists, other=0.0)
    if rotation.signs is not None:
        signs = triton.load(rotation.signs.at[channel], mask=channel < channels, other=0.0)
        query = query * signs.astype(query.dtype)[None, :]
    turned = jnp.zeros((channel.shape[0], head.shape[0]), jnp.float32)
    for part in load_parts(rotation, channel.shape[0], channels):
        turned = turned + triton.float_dot(part, query, 1, 1)
    place = out.at[head[None, :], channel[:, None]]
    exists = (head < heads)[None, :] & (channel < channels)[:, None]
    triton.store(place, turned * gain, mask=exists)
