"""Queries in the rotated space, RoPE included: the calls."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.primitives import triton
from pallas_kernels.primitives.rotation import RotationOperand
from pallas_kernels.rope.kernel import (
    ROWS,
    VECTORS,
    WARPS,
    rope_and_rotate_kernel,
    rotate_kernel,
)


def rotate(q: Float[Array, "B N H"], rotation: RotationOperand) -> Float[Array, "B N H"]:
    """Pi q in float32, signs included, in one kernel where XLA makes three.

    Exact products: raises ValueError unless queries and parts have one 16-bit type.
    """
    batch, heads, channels = q.shape
    _check_exact("queries", q, rotation)
    matrices = rotation.parts.shape[1]  # one, or one for each kv head
    grouped = q.reshape(batch, matrices, heads // matrices, channels)
    of_head = triton.BlockSpec((batch, None, *grouped.shape[2:]), lambda i, j, h: (0, h, 0, 0))
    turned = triton.call(
        functools.partial(rotate_kernel, gain=rotation.gain),
        _launch(channels, batch * grouped.shape[2], matrices),
        in_specs=(of_head, jax.tree.map(_of_matrix, rotation)),
        out_specs=of_head,
        out_shape=jax.ShapeDtypeStruct(grouped.shape, jnp.float32),
        name="rotate_queries",
    )(grouped, rotation)
    return turned.reshape(q.shape)


def rope_and_rotate(
    qkv: Float[Array, "B K group H"],
    cos: Float[Array, "B H/2"],
    sin: Float[Array, "B H/2"],
    rotation: RotationOperand,
) -> tuple[
    Float[Array, "B N H"], Float[Array, "B K H"], Float[Array, "B K H"], Float[Array, "B N H"]
]:
    """RoPE of queries and keys, and Pi q in float32, in one kernel where XLA makes three more.

    Each kv head has its G queries, its key and its value; the pairs (i, i + H/2) of their channels
    are turned. Returns queries, keys and values in their dtype, and what `rotate` makes of the
    queries, with its errors.
    """
    batch, kv_heads, group, channels = qkv.shape
    _check_exact("projections", qkv, rotation)
    matrices = rotation.parts.shape[1]  # one, or one for each kv head
    heads = kv_heads // matrices

    def of_head(*shape: int) -> Any:
        return triton.BlockSpec((batch, None, *shape), lambda i, j, h: (0, h, *(0 for _ in shape)))

    angles = triton.BlockSpec(cos.shape, lambda i, j, h: (0, 0))
    shapes = [(heads, count, channels) for count in (group - 2, 1, 1, group - 2)]
    types = [qkv.dtype] * 3 + [jnp.float32]
    query, key, value, rotated = triton.call(
        functools.partial(rope_and_rotate_kernel, gain=rotation.gain),
        _launch(channels, batch * heads * group, matrices),
        in_specs=(
            of_head(heads, group, channels), (angles, angles), jax.tree.map(_of_matrix, rotation),
        ),
        out_specs=[of_head(*shape) for shape in shapes],
        out_shape=[
            jax.ShapeDtypeStruct((batch, matrices, *shape), dtype)
            for shape, dtype in zip(shapes, types, strict=True)
        ],
        name="rope_and_rotate",
    )(qkv.reshape(batch, matrices, heads, group, channels), (cos, sin), rotation)  # fmt: skip
    queries, keys = (batch, -1, channels), (batch, kv_heads, channels)
    return query.reshape(queries), key.reshape(keys), value.reshape(keys), rotated.reshape(queries)


def _launch(channels: int, vectors: int, matrices: int) -> triton.Launch:
    """Programs (rows of the matrix, vectors, matrices)."""
    grid = (-(-channels // ROWS), -(-vectors // VECTORS), matrices)
    return triton.Launch(grid, warps=WARPS, stages=1)


def _check_exact(what: str, x: jax.Array, rotation: RotationOperand) -> None:
    """Raises unless products of these are exact."""
    if x.dtype != rotation.parts.dtype or x.dtype.itemsize != 2:
        raise ValueError(
            f"{what} and rotation: got {x.dtype} and {rotation.parts.dtype}, "
            "expected one 16-bit type"
        )


def _of_matrix(x: Any) -> Any:
    """The block of an array of a rotation in a grid whose last axis is the matrices."""
    if x.ndim == 1:
        return triton.BlockSpec(x.shape, lambda i, j, h: (0,))
    return triton.BlockSpec((x.shape[0], None, *x.shape[2:]), lambda i, j, h: (0, h, 0, 0))
