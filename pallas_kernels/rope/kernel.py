"""The kernels of `rotate` and `rope_and_rotate`: rotations of few vectors."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.primitives import triton
from pallas_kernels.primitives.dequantize import divide, power_of_two
from pallas_kernels.primitives.rotation import load_parts

# Rows of a rotation that a program multiplies by, and vectors that it multiplies.
ROWS, VECTORS = 32, 32
WARPS = 2


def rotate_kernel(q: Any, rotation: Any, out: Any, *, gain: float) -> None:
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


def rope_and_rotate_kernel(
    qkv: Any, angles: tuple[Any, Any], rotation: Any,
    query: Any, key: Any, value: Any, rotated: Any, *, gain: float,
) -> None:  # fmt: skip
    """One program of the grid (rows of the matrix, vectors, matrices); `angles`: cos and sin.

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
        triton.load(x.at[sequence[:, None], pair[None, :]], mask=mask, other=0.0) for x in angles
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
