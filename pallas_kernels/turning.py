"""Rotations of few vectors: queries into the rotated space, RoPE included, and outputs back."""

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


def rotate(q: Float[Array, "B N H"], rotation: Rotation) -> Float[Array, "B N H"]:
    """Pi q in float32, signs included, in one kernel where XLA makes three.

    Exact products: raises ValueError unless queries and parts have one 16-bit type.
    """
    batch, heads, channels = q.shape
    _check_exact("queries", q, rotation)
    matrices = rotation.parts.shape[1]  # one, or one for each kv head
    grouped = q.reshape(batch, matrices, heads // matrices, channels)
    of_head = triton.BlockSpec((batch, None, *grouped.shape[2:]), lambda i, j, h: (0, h, 0, 0))
    turned = triton.call(
        functools.partial(_rotate_kernel, gain=rotation.gain),
        grid=(-(-channels // ROWS), -(-batch * grouped.shape[2] // VECTORS), matrices),
        in_specs=(of_head, jax.tree.map(_of_matrix, rotation)),
        out_specs=of_head,
        out_shape=jax.ShapeDtypeStruct(grouped.shape, jnp.float32),
        warps=WARPS,
        stages=1,
        name="rotate_queries",
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
    query = triton.load(
        q.at[sequence[:, None], head[:, None], channel[None, :]],
        mask=exists[:, None] & (channel < channels)[None, :],
        other=0.0,
    )
    turned = jnp.zeros((VECTORS, ROWS), jnp.float32)
    turned = _add_product(turned, query, rotation, row, channel, channels)
    place = out.at[sequence[:, None], head[:, None], row[None, :]]
    mask = exists[:, None] & (row < channels)[None, :]
    triton.store(place, turned * gain, mask=mask)


def rope_and_rotate(
    qkv: Float[Array, "B K G+2 H"],
    cos: Float[Array, "B H/2"],
    sin: Float[Array, "B H/2"],
    rotation: Rotation,
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
        functools.partial(_rope_and_rotate_kernel, gain=rotation.gain),
        grid=(-(-channels // ROWS), -(-batch * heads * group // VECTORS), matrices),
        in_specs=(
            of_head(heads, group, channels), angles, angles, jax.tree.map(_of_matrix, rotation),
        ),
        out_specs=[of_head(*shape) for shape in shapes],
        out_shape=[
            jax.ShapeDtypeStruct((batch, matrices, *shape), dtype)
            for shape, dtype in zip(shapes, types, strict=True)
        ],
        warps=WARPS,
        stages=1,
        name="rope_and_rotate",
    )(qkv.reshape(batch, matrices, heads, group, channels), cos, sin, rotation)  # fmt: skip
    queries, keys = (batch, -1, channels), (batch, kv_heads, channels)
    return query.reshape(queries), key.reshape(keys), value.reshape(keys), rotated.reshape(queries)


def _rope_and_rotate_kernel(
    qkv: Any, cos: Any, sin: Any, rotation: Any,
    query: Any, key: Any, value: Any, rotated: Any, *, gain: float,
) -> None:  # fmt: skip
    """One program of the grid (rows of the matrix, vectors, matrices).

    Halves of vectors, which meet only in the sums of the product.
    """
    batch, heads, group, channels = qkv.shape
    half = channels // 2
    pair = jnp.arange(max(16, power_of_two(half)))
    row = triton.program_id(0) * ROWS + jnp.arange(ROWS)
    vector = triton.program_id(1) * VECTORS + jnp.arange(VECTORS)
    head, place = divide(vector, group)
    sequence, head = divide(head, heads)
    inside, exists = (pair < half)[None, :], (vector < batch * heads * group)[:, None]
    mask = exists & inside

    def load(channel: jax.Array) -> jax.Array:
        at = qkv.at[sequence[:, None], head[:, None], place[:, None], channel[None, :]]
        return triton.load(at, mask=mask, other=0.0)

    raw = [load(pair), load(pair + half)]
    first, second = (x.astype(jnp.float32) for x in raw)
    c, s = (
        triton.load(x.at[sequence[:, None], pair[None, :]], mask=mask, other=0.0)
        for x in (cos, sin)
    )
    turned = [first * c - second * s, second * c + first * s]
    turned = [x.astype(qkv.dtype) for x in turned]

    # Each vector has one target; in the others its place is past the end. Each program writes what
    # belongs to one or two of them.
    targets = (
        (query, turned, jnp.where(place < group - 2, place, group)),
        (key, turned, jnp.where(place == group - 2, 0, 1)),
        (value, raw, jnp.where(place == group - 1, 0, 1)),
    )
    for number, (target, x, at) in enumerate(targets):

        @triton.when(triton.program_id(0) == number % -(-channels // ROWS))
        def write(target: Any = target, x: list[jax.Array] = x, at: jax.Array = at) -> None:
            for i, part in enumerate(x):
                channel = (pair + i * half)[None, :]
                where = target.at[sequence[:, None], head[:, None], at[:, None], channel]
                triton.store(where, part, mask=mask & (at < target.shape[2])[:, None])

    sums = jnp.zeros((VECTORS, ROWS), jnp.float32)
    for i, operand in enumerate(turned):
        sums = _add_product(sums, operand, rotation, row, pair + i * half, channels)
    at = rotated.at[sequence[:, None], head[:, None], place[:, None], row[None, :]]
    stored = exists & (place < group - 2)[:, None] & (row < channels)[None, :]
    triton.store(at, sums * gain, mask=stored)


def _check_exact(what: str, x: jax.Array, rotation: Rotation) -> None:
    """Raises unless products of these are exact."""
    if x.dtype != rotation.parts.dtype or x.dtype.itemsize != 2:
        raise ValueError(
            f"got {what} of {x.dtype} and a rotation of {rotation.parts.dtype}, "
            "expected one 16-bit type"
        )


def _of_matrix(x: Any) -> Any:
    """The block of an array of a rotation in a grid whose last axis is the matrices."""
    if x.ndim == 1:
        return triton.BlockSpec(x.shape, lambda i, j, h: (0,))
    return triton.BlockSpec((x.shape[0], None, *x.shape[2:]), lambda i, j, h: (0, h, 0, 0))


def _add_product(
    sums: jax.Array, x: jax.Array, rotation: Any, row: jax.Array, channel: jax.Array, channels: int
) -> jax.Array:
    """Sums [vectors, rows] and the product of vectors, 0 beyond their channels, with the matrix."""
    if rotation.signs is not None:
        signs = triton.load(rotation.signs.at[channel], mask=channel < channels, other=0.0)
        x = x * signs.astype(x.dtype)[None, :]
    for part in load_parts(rotation, row, channel, channels):
        sums = sums + triton.float_dot(x, part, 1, 1)
    return sums
