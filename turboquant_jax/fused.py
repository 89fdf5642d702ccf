"""The GPU kernel's view of a cache: one step of decoding over all of its segments.

Everything is passed as it lies in the cache, the pools of all layers as one pool whose page table
starts at the layer's first page; nothing is copied.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.codebook import Codebook
from pallas_kernels.decode_attention import Blocks, Recent, decode_attention
from turboquant_jax import codebook as codebooks
from turboquant_jax.cache.codec import Codec
from turboquant_jax.cache.state import Cache
from turboquant_jax.quantizer import Quantizer
from turboquant_jax.rotation import Identity


def unserved(cache: Cache, queries: int) -> str | None:
    """Why the kernel does not serve this call on this device, or None if it does."""
    if queries != 1:
        return f"{queries} query tokens per sequence, served is 1"
    if not cache.page_table.shape[1]:
        return "a cache without blocks"
    if jnp.dtype(cache.config.dtype).itemsize not in (2, 4):
        return f"a full precision of {cache.config.dtype}, served are 16 and 32 bits"
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


def attend(
    cache: Cache,
    layer: Int[Array, ""],
    query: Float[Array, "B N H"],
    rotated: Float[Array, "B N H"],
    new: tuple[Float[Array, "B 1 K H"], Float[Array, "B 1 K H"]],
    seen: Bool[Array, "B S"],
    *,
    scale: float,
    softcap: float | None,
    sink_logits: Float[Array, " N"] | None,
    interpret: bool = False,
) -> Float[Array, "B N H"]:
    """Attention of one query per sequence over a layer, in the dtype of the query.

    `rotated` is the query in the rotated space of the keys, `new` the key and value of the token
    itself, `seen` the slots of sinks, window and new token that count.
    """
    groups, table, lengths, starts = blocks_of(cache, layer)
    return decode_attention(
        rotated,
        groups,
        table,
        lengths,
        sm_scale=scale,
        starts=starts,
        soft_cap=softcap,
        sink_logits=sink_logits,
        recent=_recent(cache, layer, query, new, seen),
        unrotation=_unrotation(cache.codecs[1], layer, cache.config.head_dim),
        dtype=query.dtype,
        interpret=interpret,
    )[0]


def _recent(cache: Cache, layer, query, new, seen) -> Recent:
    batch = jnp.arange(query.shape[0], dtype=jnp.int32)
    stored = [part for part in (cache.sinks, cache.window) if part.keys.shape[2]]
    rows = [layer * query.shape[0] + batch] * len(stored) + [batch]
    return Recent(
        query=query,
        keys=(*(_flat(part.keys) for part in stored), new[0]),
        values=(*(_flat(part.values) for part in stored), new[1]),
        rows=jnp.stack(rows, axis=1),
        seen=seen.astype(jnp.int32),
        key_mean=None if cache.key_mean is None else _flat(cache.key_mean),
    )


def _unrotation(codec: Codec, layer, dim: int) -> Float[Array, "heads H H"] | None:
    """The matrix back from the rotated space: of each head where their channels are ordered."""
    if codec.order is None and all(isinstance(g.rotation, Identity) for g in codec.groups):
        return None
    heads = 1 if codec.order is None else codec.order.shape[1]
    unit = jnp.broadcast_to(jnp.eye(dim)[:, None, :], (dim, heads, dim))
    return jnp.moveaxis(codec.unrotate(layer, unit), 0, 2)


def blocks_of(cache: Cache, layer: Int[Array, ""]):
    """Groups of pages, page table, and the tokens that count: up to `lengths`, from `starts`."""
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
    groups = tuple(
        Blocks(
            jax.tree.map(_flat, keys),
            jax.tree.map(_flat, values),
            _flat(scales),
            _table(key),
            _table(value),
        )
        for keys, values, scales, key, value in zip(
            cache.pool.keys, cache.pool.values, cache.pool.scales,
            *(codec.groups for codec in cache.codecs), strict=True,
        )
    )  # fmt: skip
    return groups, jnp.maximum(table, 0) + layer * pages, lengths, starts


def _flat(x: Array) -> Array:
    """The layers as more of what a layer has."""
    return x.reshape(-1, *x.shape[2:])


def _table(group: Quantizer) -> Codebook:
    integers = codebooks.grid_integers(group.levels)
    if integers is None:
        raise NotImplementedError("the kernel serves codebooks on its grid: codebook='grid'")
    levels, step = integers
    return Codebook(group.bits, levels, step)
