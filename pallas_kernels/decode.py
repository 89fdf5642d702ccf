"""From packed blocks back to vectors, in the rotated space: for what reads them more than once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import triton
from pallas_kernels.blocks import Blocks, check_pool
from pallas_kernels.codebook import Codebook
from pallas_kernels.dequantize import divide, power_of_two
from pallas_kernels.scores import key_scale, value_scale
from pallas_kernels.trellis import code_number


def decode(
    groups: tuple[Blocks, ...],
    pages: Int[Array, " jobs"],
    heads: Int[Array, " heads"],
    *,
    dtype: DTypeLike = jnp.bfloat16,
) -> tuple[Float[Array, "jobs T heads H"], Float[Array, "jobs T heads H"]]:
    """Keys and values of some pages and kv heads: scale * step * level.

    The groups' channels come one after another.

    Raises ValueError for planes that do not fit, NotImplementedError for what is not served.
    """
    _, _, tokens = check_pool(groups)
    channels = sum(group.values[0].shape[2] for group in groups)
    inputs = {
        "keys": [group.keys for group in groups],
        "values": [group.values for group in groups],
        "scales": [group.scales for group in groups],
    }
    tables = {
        "keys": [_table(group.key_codebook) for group in groups],
        "values": [_table(group.value_codebook) for group in groups],
    }

    out = jax.ShapeDtypeStruct((pages.shape[0], tokens, heads.shape[0], channels), dtype)
    spec = triton.BlockSpec((None, tokens, None, channels), lambda i, h: (i, 0, h, 0))
    return triton.call(
        lambda pages, heads, pool, tables, keys, values: _decode_kernel(
            pages[0], heads[0], pool, tables, {"keys": keys, "values": values}, groups=groups
        ),
        grid=(pages.shape[0], heads.shape[0]),
        in_specs=(
            triton.BlockSpec((1,), lambda i, h: (i,)),
            triton.BlockSpec((1,), lambda i, h: (h,)),
            *jax.tree.map(
                lambda x: triton.BlockSpec(x.shape, lambda i, h: (0,) * x.ndim), (inputs, tables)
            ),
        ),
        out_specs=(spec, spec),
        out_shape=(out, out),
        warps=4,
        stages=1,
        name="decode",
    )(pages.astype(jnp.int32), heads.astype(jnp.int32), inputs, jax.tree.map(jnp.asarray, tables))


def _table(codebook: Codebook) -> np.ndarray:
    return np.array(codebook.levels, np.float32) * np.float32(codebook.step)


def _decode_kernel(
    page: Any, head: Any, pool: Any, tables: Any, outputs: Any, *, groups: tuple[Blocks, ...]
) -> None:
    """One program of the grid (page, kv head)."""
    first = 0
    tokens = groups[0].scales.shape[2]
    token = jnp.arange(tokens)
    for g, group in enumerate(groups):
        dim = group.values[0].shape[2]
        channel = jnp.arange(power_of_two(dim))
        exists = jnp.broadcast_to((channel < dim)[None, :], (tokens, channel.shape[0]))
        word = triton.load(pool["scales"][g].at[page, head, token])
        books = {"keys": group.key_codebook, "values": group.value_codebook}
        for side, scale in (("keys", key_scale(word)), ("values", value_scale(word))):
            field = _fields(pool[side][g], books[side], (page, head), tokens, dim, side == "keys")
            code = code_number(books[side], field)
            vector = triton.load(tables[side][g].at[code]) * scale[:, None]
            target = outputs[side].at[token[:, None], (first + channel)[None, :]]
            triton.store(target, vector.astype(outputs[side].dtype), mask=exists)
        first += dim


def _fields(
    planes: Any, book: Codebook, place: tuple, tokens: int, dim: int, keys: bool
) -> Callable[[int, int], jax.Array]:
    """(plane, back) -> int32 fields [tokens, channels] of the channels `back` before each of them,

    0 before the first; of the page `place`, whose keys, or values, they are.
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
