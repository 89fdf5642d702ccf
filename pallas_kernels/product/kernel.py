"""The kernel of `matrix_vector`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.primitives import triton

# A program sums some rows; in a turn a thread of it loads 128 bytes, so that four programs, which
# fit a multiprocessor, have 64 KiB on their way.
ROWS, CHANNELS = 8, 1024
WARPS = 4


def matrix_vector_kernel(weight: Any, x: Any, bias: Any, out: Any) -> None:
    """One program of the grid (rows of the matrix)."""
    rows, channels = weight.shape
    row = triton.program_id(0) * ROWS + jnp.arange(ROWS)
    exists = row < rows
    whole = rows % ROWS == 0 and channels % CHANNELS == 0

    def add(turn: jax.Array, sums: jax.Array) -> jax.Array:
        channel = turn * CHANNELS + jnp.arange(CHANNELS)
        inside = channel < channels
        own = dict(mask=exists[:, None] & inside[None, :], other=0.0)
        shared = dict(mask=inside, other=0.0)
        if whole:
            own = shared = {}
        matrix = triton.load(weight.at[row[:, None], channel[None, :]], **own)
        vector = triton.load(x.at[channel], **shared)
        return sums + matrix.astype(jnp.float32) * vector.astype(jnp.float32)[None, :]

    sums = jnp.zeros((ROWS, CHANNELS), jnp.float32)
    sums = lax.fori_loop(0, -(-channels // CHANNELS), add, sums)
    total = jnp.sum(sums, axis=1)
    if bias is not None:
        total += triton.load(bias.at[row], mask=exists, other=0.0).astype(jnp.float32)
    triton.store(out.at[row], total.astype(out.dtype), mask=exists)
