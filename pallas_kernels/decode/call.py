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
    rows: Int[Array, " heads"],
    numbers: Int[Array, " heads"] | None = None,
    *,
    dtype: DTypeLike = jnp.bfloat16,
) -> tuple[Float[Array, "jobs T heads H"], Float[Array, "jobs T heads H"]]:
    """Keys and values of some pages of some rows: scale * step * level.

    `numbers`: in which of the pools each row is, if they are several. The groups' channels come one
    after another.

    Raises ValueError for planes that do not fit, NotImplementedError for what is not served.
    """
    shapes = {(check_pool(pool)[2], sum(pool.value_channels)) for pool in pools}
    if len(shapes) != 1:
        raise ValueError(
            f"pools: got pages of (tokens, channels) {sorted(shapes)}, expected all alike"
        )
    if (numbers is None) != (len(pools) == 1):
        raise ValueError(f"numbers: got {numbers} of {len(pools)} pools, expected them of several")
    ((tokens, channels),) = shapes
    names = ("keys", "values", "scales", "bases")
    inputs = [{name: list(getattr(pool, name)) for name in names} for pool in pools]
    tables = [
        {
            "keys": [_table(book) for book in pool.key_codebooks],
            "values": [_table(book) for book in pool.value_codebooks],
        }
        for pool in pools
    ]

    heads = (rows,) if numbers is None else (rows, numbers)
    out = jax.ShapeDtypeStruct((pages.shape[0], tokens, rows.shape[0], channels), dtype)
    spec = triton.BlockSpec((None, tokens, None, channels), lambda i, h: (i, 0, h, 0))
    return triton.call(
        lambda pages, heads, refs, tables, keys, values: decode_kernel(
            pages[0], [x[0] for x in heads], refs, tables, {"keys": keys, "values": values},
            pools=pools,
        ),
        triton.Launch((pages.shape[0], rows.shape[0]), warps=4, stages=1),
        in_specs=(
            triton.BlockSpec((1,), lambda i, h: (i,)),
            jax.tree.map(lambda x: triton.BlockSpec((1,), lambda i, h: (h,)), heads),
            *jax.tree.map(
                lambda x: triton.BlockSpec(x.shape, lambda i, h: (0,) * x.ndim), (inputs, tables)
            ),
        ),
        out_specs=(spec, spec),
        out_shape=(out, out),
        name="decode",
    )(
        pages.astype(jnp.int32),
        tuple(x.astype(jnp.int32) for x in heads),
        inputs,
        jax.tree.map(jnp.asarray, tables),
    )  # fmt: skip


def _table(codebook: CodebookOperand) -> np.ndarray:
    return np.array(codebook.levels, np.float32) * np.float32(codebook.step)
