"""Packed blocks as vectors: the call."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.decode.kernel import decode_kernel
from pallas_kernels.primitives import triton
from pallas_kernels.primitives.blocks import BlocksOperand, check_pool
from pallas_kernels.primitives.codebook import CodebookOperand


def decode(
    blocks: BlocksOperand,
    pages: Int[Array, " jobs"],
    rows: Int[Array, " heads"],
    *,
    dtype: DTypeLike = jnp.bfloat16,
) -> tuple[Float[Array, "jobs T heads H"], Float[Array, "jobs T heads H"]]:
    """Keys and values of some pages of some rows: scale * step * level.

    The groups' channels come one after another.

    Raises ValueError for planes that do not fit, NotImplementedError for what is not served.
    """
    _, _, tokens = check_pool(blocks)
    channels = sum(blocks.value_channels)
    inputs = {
        "keys": list(blocks.keys),
        "values": list(blocks.values),
        "scales": list(blocks.scales),
    }
    tables = {
        "keys": [_table(book) for book in blocks.key_codebooks],
        "values": [_table(book) for book in blocks.value_codebooks],
    }

    out = jax.ShapeDtypeStruct((pages.shape[0], tokens, rows.shape[0], channels), dtype)
    spec = triton.BlockSpec((None, tokens, None, channels), lambda i, h: (i, 0, h, 0))
    return triton.call(
        lambda pages, rows, pool, tables, keys, values: decode_kernel(
            pages[0], rows[0], pool, tables, {"keys": keys, "values": values}, blocks=blocks
        ),
        triton.Launch((pages.shape[0], rows.shape[0]), warps=4, stages=1),
        in_specs=(
            triton.BlockSpec((1,), lambda i, h: (i,)),
            triton.BlockSpec((1,), lambda i, h: (h,)),
            *jax.tree.map(
                lambda x: triton.BlockSpec(x.shape, lambda i, h: (0,) * x.ndim), (inputs, tables)
            ),
        ),
        out_specs=(spec, spec),
        out_shape=(out, out),
        name="decode",
    )(pages.astype(jnp.int32), rows.astype(jnp.int32), inputs, jax.tree.map(jnp.asarray, tables))


def _table(codebook: CodebookOperand) -> np.ndarray:
    return np.array(codebook.levels, np.float32) * np.float32(codebook.step)
