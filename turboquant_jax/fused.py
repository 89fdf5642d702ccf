"""The GPU kernel's view of a cache: one step of decoding over all of its segments.

Everything is passed as it lies in the cache, the pools of all layers as one pool whose page table
starts at the layer's first page; nothing is copied.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.codebook import Codebook
from pallas_kernels.decode import decode as decode_pages
from pallas_kernels.decode_attention import Blocks, Recent, decode_attention
from turboquant_jax import codebook as codebooks
from turboquant_jax.cache import operands
from turboquant_jax.cache.codec import Codec
from turboquant_jax.cache.operands import flat
from turboquant_jax.cache.state import Cache, Exact
from turboquant_jax.quantizer import Quantizer
from turboquant_jax.rotated import rotate_queries
from turboquant_jax.rotation import Identity


def unserved(cache: Cache, queries: int) -> str | None:
    """Why the kernel does not serve this call on this device, or None if it does."""
    if queries != 1:
        return f"{queries} query tokens per sequence, served is 1"
    if jnp.dtype(cache.config.dtype).itemsize not in (2, 4):
        return f"a full precision of {cache.config.dtype}, served are 16 and 32 bits"
    return unserved_blocks(cache)


def unserved_blocks(cache: Cache) -> str | None:
    """Why the kernels do not read the blocks of this cache on this device, or None if they do."""
    if not cache.page_table.shape[1]:
        return "a cache without blocks"
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
    new: tuple[Float[Array, "B 1 K H"], Float[Array, "B 1 K H"]],
    *,
    scale: float,
    softcap: float | None,
    sink_logits: Float[Array, " N"] | None,
    write: bool,
    interpret: bool = False,
) -> tuple[Float[Array, "B N H"], Cache]:
    """Attention of one query per sequence over a layer and over the new token's key and value.

    The output has the dtype of the query. `write` also writes the token where it is pending.
    """
    key_codec, value_codec = cache.codecs
    groups, table, first_page, lengths, starts = blocks_of(cache, layer)
    rotated = all(
        value_codec.order is not None or not isinstance(group.rotation, Identity)
        for group in value_codec.groups
    )
    output, _, recent = decode_attention(
        rotate(key_codec, layer, query[:, None], cache.config.num_kv_heads)[:, 0],
        groups,
        table,
        lengths,
        sm_scale=scale,
        first_page=first_page,
        starts=starts,
        soft_cap=softcap,
        sink_logits=sink_logits,
        recent=_recent(cache, layer, query, new, write),
        rotation=operands.of_codec(value_codec, layer) if rotated else None,
        dtype=query.dtype,
        interpret=interpret,
    )
    return output, cache if recent is None or not write else _written(cache, recent)


def rotate(
    codec: Codec, layer: Int[Array, ""], query: Float[Array, "B T N H"], kv_heads: int
) -> Float[Array, "B T N H"]:
    """Queries in the rotated space of the keys, float32; on the tensor cores from bfloat16."""
    if query.dtype != jnp.bfloat16:
        return rotate_queries(codec, layer, query, kv_heads)
    rotation = operands.of_codec(codec, layer)
    if rotation.signs is not None:
        query = query * rotation.signs.astype(query.dtype)[None, None, None, :]
    heads = rotation.parts.shape[1]
    grouped = query.reshape(*query.shape[:2], heads, -1, query.shape[3])
    turned = jnp.zeros(grouped.shape, jnp.float32)
    for part in rotation.parts:
        turned = turned + jnp.einsum(
            "btkgi,kji->btkgj", grouped, part, preferred_element_type=jnp.float32
        )
    return (turned * rotation.gain).reshape(query.shape)


def _recent(cache: Cache, layer, query, new, write: bool) -> Recent:
    config, lengths = cache.config, cache.lengths
    oldest = jnp.zeros_like(lengths)
    if config.sliding_window is not None:
        oldest = jnp.maximum(lengths + 1 - config.sliding_window, 0)
    row = layer * query.shape[0] + jnp.arange(query.shape[0], dtype=jnp.int32)
    pending, spans, keys, values = cache.pending > 0, [], [], []
    sinks, ring = (part.keys.shape[2] for part in (cache.sinks, cache.window))
    if sinks:
        slot = jnp.where(pending, lengths, -1)  # past the sinks: nowhere
        spans.append((row, oldest, jnp.minimum(lengths, sinks) - oldest, slot))
    if ring:
        edge = jnp.maximum(config.sinks + config.compressed_tokens(lengths), oldest)
        slot = jnp.where(pending & (lengths >= config.sinks), (lengths - config.sinks) % ring, -1)
        spans.append((row, (edge - config.sinks) % ring, lengths - edge, slot))
    nothing = jnp.zeros_like(row)
    spans.append((jnp.arange(row.shape[0], dtype=jnp.int32), nothing, nothing + 1, nothing))
    for part in (cache.sinks, cache.window):
        if part.keys.shape[2]:
            keys.append(flat(part.keys))
            values.append(flat(part.values))
    return Recent(
        query=query,
        keys=(*keys, new[0]),
        values=(*values, new[1]),
        spans=jnp.stack([x for span in spans for x in span], axis=1).reshape(len(row), -1, 4),
        key_mean=None if cache.key_mean is None else flat(cache.key_mean),
        write=write,
    )


def _written(cache: Cache, recent: Recent) -> Cache:
    """The cache with the segments of `recent`, which hold the new token."""
    stored = zip(recent.keys[:-1], recent.values[:-1], strict=True)
    parts: dict[str, Any] = {}
    for name in ("sinks", "window"):
        old = getattr(cache, name)
        if old.keys.shape[2]:
            keys, values = next(stored)
            parts[name] = Exact(keys.reshape(old.keys.shape), values.reshape(old.values.shape))
    return replace(cache, **parts)


def blocks_of(cache: Cache, layer: Int[Array, ""]):
    """Groups of pages, page table, the layer's first page, the tokens `starts` to `lengths`."""
    config, slots = cache.config, cache.page_table.shape[1]
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
    return _groups(cache), table, layer * cache.references.shape[0], lengths, starts


def decode(
    cache: Cache,
    layer: Int[Array, ""],
    pages: Int[Array, "B pages"],
    heads: Int[Array, " heads"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B S heads H"], Float[Array, "B S heads H"]]:
    """Keys and values of some pages and heads of a layer in the rotated space, in its dtype."""
    page = pages.ravel() + layer * cache.references.shape[0]
    dtype = cache.config.dtype
    found = decode_pages(_groups(cache), page, heads, dtype=dtype, interpret=interpret)
    shape = (pages.shape[0], -1, *found[0].shape[2:])
    return found[0].reshape(shape), found[1].reshape(shape)


def _groups(cache: Cache) -> tuple[Blocks, ...]:
    return tuple(
        Blocks(
            jax.tree.map(flat, keys),
            jax.tree.map(flat, values),
            flat(scales),
            _table(key),
            _table(value),
        )
        for keys, values, scales, key, value in zip(
            cache.pool.keys, cache.pool.values, cache.pool.scales,
            *(codec.groups for codec in cache.codecs), strict=True,
        )
    )  # fmt: skip


def _table(group: Quantizer) -> Codebook:
    integers = codebooks.grid_integers(group.levels)
    if integers is None:
        raise NotImplementedError("the kernel serves codebooks on its grid: codebook='grid'")
    levels, step = integers
    return Codebook(group.bits, levels, step)
