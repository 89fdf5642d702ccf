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
    pools: tuple[BlocksOperand, ...],
    pages: Int[Array, " jobs"],
    heads: Int[Array, "heads 2"],
    *,
    dtype: DTypeLike = jnp.bfloat16,
) -> tuple[Float[Array, "jobs T heads H"], Float[Array, "jobs T heads H"]]:
    """Keys and values of some pages of some heads: scale * step * level.

    `heads`: of each the number of its pool, and its row there. The groups' channels come one after
    another.

    Raises ValueError for planes that do not fit, NotImplementedError for what is not served.
    """
    shapes = {(check_pool(pool)[2], sum(pool.value_channels)) for pool in pools}
    if len(shapes) != 1:
        raise ValueError(
            f"pools: got pages of (tokens, channels) {sorted(shapes)}, expected all alike"
        )
    ((tokens, channels),) = shapes
    inputs = [
        {"keys": list(x.keys), "values": list(x.values), "scales": list(x.scales)} for x in pools
    ]
    tables = [
        {
            "keys": [_table(book) for book in pool.key_codebooks],
            "values": [_table(book) for book in pool.value_codebooks],
        }
        for pool in pools
    ]

    out = jax.ShapeDtypeStruct((pages.shape[0], tokens, heads.shape[0], channels), dtype)
    spec = triton.BlockSpec((None, tokens, None, channels), lambda i, h: (i, 0, h, 0))
    return triton.call(
        lambda pages, heads, refs, tables, keys, values: decode_kernel(
            pages[0], heads, refs, tables, {"keys": keys, "values": values}, pools=pools
        ),
        triton.Launch((pages.shape[0], heads.shape[0]), warps=4, stages=1),
        in_specs=(
            triton.BlockSpec((1,), lambda i, h: (i,)),
            triton.BlockSpec((None, 2), lambda i, h: (h, 0)),
            *jax.tree.map(
                lambda x: triton.BlockSpec(x.shape, lambda i, h: (0,) * x.ndim), (inputs, tables)
            ),
        ),
        out_specs=(spec, spec),
        out_shape=(out, out),
        name="decode",
    )(pages.astype(jnp.int32), heads.astype(jnp.int32), inputs, jax.tree.map(jnp.asarray, tables))


def _table(codebook: CodebookOperand) -> np.ndarray:
    return np.array(codebook.levels, np.float32) * np.float32(codebook.step)
