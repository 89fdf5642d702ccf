"""The kernel of `decode`: a program decodes a page of one row."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.primitives import triton
from pallas_kernels.primitives.blocks import BlocksOperand, key_scale, load_scales, value_scale
from pallas_kernels.primitives.codebook import CodebookOperand
from pallas_kernels.primitives.dequantize import divide, power_of_two
from pallas_kernels.primitives.trellis import code_number


def decode_kernel(
    page: Any, head: list, refs: Any, tables: Any, outputs: Any, *, pools: tuple[BlocksOperand, ...]
) -> None:
    """One program of the grid (pages, heads); of `pools` only the static facts.

    `head`: its row, and the number of its pool where they are several.
    """
    for number, parts in enumerate(zip(refs, tables, pools, strict=True)):
        run = partial(_decode, page, head[0], *parts[:2], outputs, blocks=parts[2])
        if len(pools) == 1:
            run()
        else:
            triton.when(head[1] == number)(run)


def _decode(
    page: Any, row: Any, pool: Any, tables: Any, outputs: Any, *, blocks: BlocksOperand
) -> None:
    tokens = blocks.scales[0].shape[2]
    token = jnp.arange(tokens)

    @cache
    def channels_of(dim: int) -> tuple[jax.Array, jax.Array]:
        channel = jnp.arange(power_of_two(dim))
        return channel, jnp.broadcast_to((channel < dim)[None, :], (tokens, channel.shape[0]))

    @cache
    def scales_of(number: int) -> tuple[jax.Array, jax.Array]:
        word = load_scales(pool, number, (row, page, token))
        return key_scale(word), value_scale(word)

    sides = (
        ("keys", blocks.key_codebooks, blocks.key_channels, blocks.key_words),
        ("values", blocks.value_codebooks, blocks.value_channels, blocks.value_words),
    )
    for half, (side, books, channels, numbers) in enumerate(sides):
        if not books:
            _copy(pool[side][0][0], outputs[side], (row, page), (token, *channels_of(channels[0])))
            continue
        first = 0
        for g, (book, dim, number) in enumerate(zip(books, channels, numbers, strict=True)):
            channel, exists = channels_of(dim)
            scale = scales_of(number)[half]
            field = _fields(pool[side][g], book, (row, page), tokens, dim, side == "keys")
            code = code_number(book, field)
            vector = triton.load(tables[side][g].at[code]) * scale[:, None]
            target = outputs[side].at[token[:, None], (first + channel)[None, :]]
            triton.store(target, vector.astype(outputs[side].dtype), mask=exists)
            first += dim


def _copy(source: Any, target: Any, place: tuple, rows: tuple) -> None:
    """Vectors in full precision."""
    token, channel, exists = rows
    found = triton.load(source.at[*place, token[:, None], channel[None, :]], mask=exists, other=0.0)
    at = target.at[token[:, None], channel[None, :]]
    triton.store(at, found.astype(target.dtype), mask=exists)


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
