"""The kernel of `decode`: a program decodes a page of one row."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.primitives import triton
from pallas_kernels.primitives.blocks import BlocksOperand, key_scale, value_scale
from pallas_kernels.primitives.codebook import CodebookOperand
from pallas_kernels.primitives.dequantize import divide, power_of_two
from pallas_kernels.primitives.trellis import code_number


def decode_kernel(
    page: Any, row: Any, pool: Any, tables: Any, outputs: Any, *, groups: tuple[BlocksOperand, ...]
) -> None:
    """One program of the grid (pages, rows)."""
    first = 0
    tokens = groups[0].scales.shape[2]
    token = jnp.arange(tokens)
    for g, group in enumerate(groups):
        dim = group.values[0].shape[2]
        channel = jnp.arange(power_of_two(dim))
        exists = jnp.broadcast_to((channel < dim)[None, :], (tokens, channel.shape[0]))
        word = triton.load(pool["scales"][g].at[row, page, token])
        books = {"keys": group.key_codebook, "values": group.value_codebook}
        for side, scale in (("keys", key_scale(word)), ("values", value_scale(word))):
            field = _fields(pool[side][g], books[side], (row, page), tokens, dim, side == "keys")
            code = code_number(books[side], field)
            vector = triton.load(tables[side][g].at[code]) * scale[:, None]
            target = outputs[side].at[token[:, None], (first + channel)[None, :]]
            triton.store(target, vector.astype(outputs[side].dtype), mask=exists)
        first += dim


def _fields(
    planes: Any, book: CodebookOperand, place: tuple, tokens: int, dim: int, keys: bool
) -> Callable[[int, int], jax.Array]:
    """(plane, back) -> int32 fields [tokens, channels] of the channels `back` before each of them,

    0 before the first; of the (row, page) `place`, whose keys, or values, they are.
    """
    token, channel = jnp.arange(tokens), jnp.arange(power_of_two(dim))

    def field(plane: int, back: int) -> jax.Array:
        width, own = book.widths[plane], jnp.maximum(channel - back, 0)
        if keys:
            part, byte = divide(own, dim * width // 8)
            index, shift = (token[:, None], byte[None, :]), (width * part)[None, :]
        else:
            part, byte = divide(token, tokens * width // 8)
            index, shift = (own[None, :], byte[:, None]), (width * part)[:, None]
        there = jnp.broadcast_to(
            ((channel >= back) & (channel < dim))[None, :], (tokens, channel.shape[0])
        )
        found = triton.load(planes[plane].at[*place, *index], mask=there, other=0)
        return (found.astype(jnp.int32) >> shift) & (2**width - 1)

    return field
