"""From packed blocks back to vectors, in the rotated space: for what reads them more than once."""

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
    *,
    dtype: DTypeLike = jnp.bfloat16,
    interpret: bool = False,
) -> tuple[Float[Array, "jobs T K H"], Float[Array, "jobs T K H"]]:
    """Keys and values of some pages, scale * step * level, the groups' channels one after another.

    Raises ValueError for planes that do not fit, NotImplementedError for what is not served.
    """
    _, heads, tokens = check_pool(groups)
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

    def of_head(x: jax.Array) -> Any:
        return triton.BlockSpec(
            (x.shape[0], None, *x.shape[2:]), lambda i, h: (0, h) + (0,) * (x.ndim - 2)
        )

    out = jax.ShapeDtypeStruct((pages.shape[0], tokens, heads, channels), dtype)
    spec = triton.BlockSpec((None, tokens, None, channels), lambda i, h: (i, 0, h, 0))
    return triton.call(
        lambda pages, pool, tables, keys, values: _decode_kernel(
            pages, pool, tables, {"keys": keys, "values": values}, groups=groups
        ),
        grid=(pages.shape[0], heads),
        in_specs=(
            triton.BlockSpec((1,), lambda i, h: (i,)),
            jax.tree.map(of_head, inputs),
            jax.tree.map(lambda x: triton.BlockSpec(x.shape, lambda i, h: (0,)), tables),
        ),
        out_specs=(spec, spec),
        out_shape=(out, out),
        warps=4,
        stages=1,
        name="decode",
        interpret=interpret,
    )(pages.astype(jnp.int32), inputs, jax.tree.map(jnp.asarray, tables))


def _table(codebook: Codebook) -> np.ndarray:
    return np.array(codebook.levels, np.float32) * np.float32(codebook.step)


def _decode_kernel(
    pages: Any, pool: Any, tables: Any, outputs: Any, *, groups: tuple[Blocks, ...]
) -> None:
    """One program of the grid (page, kv head)."""
    page, first = pages[0], 0
    tokens = groups[0].scales.shape[2]
    token = jnp.arange(tokens)
    for g, group in enumerate(groups):
        dim = group.values[0].shape[2]
        channel = jnp.arange(power_of_two(dim))
        exists = jnp.broadcast_to((channel < dim)[None, :], (tokens, channel.shape[0]))
        word = triton.load(pool["scales"][g].at[page, token])
        books = {"keys": group.key_codebook, "values": group.value_codebook}
        for side, scale in (("keys", key_scale(word)), ("values", value_scale(word))):

            def field(plane: int, back: int, side=side, widths=books[side].widths) -> jax.Array:
                """Fields of a plane, of the channels `back` before each, 0 before the first."""
                width, own = widths[plane], jnp.maximum(channel - back, 0)
                if side == "keys":
                    place, byte = divide(own, dim * width // 8)
                    index, shift = (token[:, None], byte[None, :]), (width * place)[None, :]
                else:
                    place, byte = divide(token, tokens * width // 8)
                    index, shift = (own[None, :], byte[:, None]), (width * place)[:, None]
                there = exists if not back else exists & (channel >= back)[None, :]
                at = pool[side][g][plane].at[page, *index]
                found = triton.load(at, mask=there, other=0).astype(jnp.int32) >> shift
                return found & (2**width - 1)

            code = code_number(books[side], field)
            vector = triton.load(tables[side][g].at[code]) * scale[:, None]
            target = outputs[side].at[token[:, None], (first + channel)[None, :]]
            triton.store(target, vector.astype(outputs[side].dtype), mask=exists)
        first += dim
