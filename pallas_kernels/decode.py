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


def decode(
    groups: tuple[Blocks, ...],
    pages: Int[Array, " jobs"],
    heads: Int[Array, " heads"],
    *,
    dtype: DTypeLike = jnp.bfloat16,
    interpret: bool = False,
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
        interpret=interpret,
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
            code, done = jnp.zeros(exists.shape, jnp.int32), 0
            for plane, width in zip(pool[side][g], books[side].widths, strict=True):
                if side == "keys":
                    place, byte = divide(channel, dim * width // 8)
                    at = plane.at[page, head, token[:, None], byte[None, :]]
                    shift = (width * place)[None, :]
                else:
                    place, byte = divide(token, tokens * width // 8)
                    at = plane.at[page, head, channel[None, :], byte[:, None]]
                    shift = (width * place)[:, None]
                field = triton.load(at, mask=exists, other=0).astype(jnp.int32) >> shift
                code = code | (field & (2**width - 1)) << done
                done += width
            vector = triton.load(tables[side][g].at[code]) * scale[:, None]
            target = outputs[side].at[token[:, None], (first + channel)[None, :]]
            triton.store(target, vector.astype(outputs[side].dtype), mask=exists)
        first += dim
