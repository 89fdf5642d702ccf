"""The GPU kernel's view of a cache: one step of decoding over the compressed blocks.

Everything is passed as it lies in the cache, the pools of all layers as one pool whose page table
starts at the layer's first page; nothing is copied.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.codebook import Codebook
from pallas_kernels.decode_attention import Blocks, decode_attention
from turboquant_jax import codebook as codebooks
from turboquant_jax.cache.state import Cache
from turboquant_jax.quantizer import Quantizer


def unserved(cache: Cache, queries: int) -> str | None:
    """Why the kernel does not serve this call on this device, or None if it does."""
    if queries != 1:
        return f"{queries} query tokens per sequence, served is 1"
    if jax.default_backend() != "gpu":
        return f"the backend {jax.default_backend()!r}, served is 'gpu'"
    key, value = cache.codecs
    if len(key.groups) != len(value.groups) or any(
        k.dim != v.dim for k, v in zip(key.groups, value.groups, strict=False)
    ):
        return "keys and values with different groups of channels"
    for group in (*key.groups, *value.groups):
        if group.code != "scalar":
            return f"a {group.code} code, served are scalar codes"
        if codebooks.grid_integers(group.levels) is None:
            return "a codebook off the kernel's grid; use codebook='grid' or 'uniform'"
    return None


def attend_blocks(
    cache: Cache,
    layer: Int[Array, ""],
    rotated: Float[Array, "B N H"],
    *,
    scale: float,
    softcap: float | None,
    bias: Float[Array, "B N"] | None,
    interpret: bool = False,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N"]]:
    """Rotated output and log-sum-exp of one query per sequence over the blocks of a layer.

    `bias` is added to the scaled scores, before the soft cap.
    """
    config, slots = cache.config, cache.page_table.shape[1]
    pages = cache.references.shape[0]
    lengths = config.compressed_tokens(cache.lengths)
    starts, table = None, cache.page_table
    if config.sliding_window is not None:
        # the ring of blocks, oldest first; then positions count from its first block
        last = lengths // config.block
        first = jnp.maximum(last - slots, 0)
        order = (first[:, None] + jnp.arange(slots, dtype=jnp.int32)[None, :]) % slots
        table = jnp.take_along_axis(table, order, axis=1)
        lengths = lengths - first * config.block
        oldest_seen = cache.lengths - config.sliding_window + 1
        starts = jnp.maximum(oldest_seen - config.sinks - first * config.block, 0)
    key_codec, value_codec = cache.codecs

    def flat(pool):
        return pool.reshape(-1, *pool.shape[2:])

    groups = tuple(
        Blocks(
            jax.tree.map(flat, keys),
            jax.tree.map(flat, values),
            flat(scales),
            _table(key),
            _table(value),
        )
        for keys, values, scales, key, value in zip(
            cache.pool.keys, cache.pool.values, cache.pool.scales,
            key_codec.groups, value_codec.groups, strict=True,
        )
    )  # fmt: skip
    return decode_attention(
        rotated,
        groups,
        jnp.maximum(table, 0) + layer * pages,
        lengths,
        sm_scale=scale,
        starts=starts,
        soft_cap=softcap,
        score_bias=bias,
        interpret=interpret,
    )


def _table(group: Quantizer) -> Codebook:
    integers = codebooks.grid_integers(group.levels)
    if integers is None:
        raise NotImplementedError("the kernel serves codebooks on its grid: codebook='grid'")
    levels, step = integers
    return Codebook(group.bits, levels, step)
