"""The compressed cache: an immutable pytree, and how tokens enter it.

Three segments hold a sequence (`config.CacheConfig` says which token lies where): sinks and recent
window in full precision, and whole blocks of compressed tokens in a pool of pages. A page holds the
block of every layer, so that one page table serves all layers; a dense cache is one whose table is
the identity.

Appending has three parts, so that a decoder can write layer by layer:

    cache = begin(cache, counts, most)           # how many tokens come; pages for new blocks
    cache = write(cache, layer, k, v)            # once a layer
    cache = commit(cache)                        # the tokens count from now on

and `append` does all of it. Nothing is ever overwritten for lack of room: a sequence that does not
fit is left as it was, and `overflow` says so.
"""

from dataclasses import dataclass, field, replace
from math import ceil

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import register_dataclass
from jaxtyping import Array, Bool, Float, Int

from turboquant_jax.cache import blocks, codec, pages
from turboquant_jax.cache.blocks import Blocks
from turboquant_jax.cache.codec import Codec
from turboquant_jax.cache.config import CacheConfig



@register_dataclass
@dataclass(frozen=True)
class Exact:
    """Tokens in full precision: keys (after RoPE) and values, not rotated."""

    keys: Float[Array, "layers B slots K H"]
    values: Float[Array, "layers B slots K H"]


@register_dataclass
@dataclass(frozen=True, repr=False)
class Cache:
    """The cache of all layers for B sequences. Immutable: every function returns a new one.

    Attributes:
      config: everything static.
      capacity: most tokens a sequence may have.
      codecs: of the keys and of the values.
      lengths: int32 [B], tokens of each sequence.
      pending: int32 [B], tokens being appended between `begin` and `commit`.
      overflow: bool [B]; True once an append did not fit. **Look at it**: that append, and every
        later one until the sequence is freed, left the sequence as it was.
      page_table: int32 [B, slots]; block j of a sequence has its page in slot j mod slots.
      references: int32 [pages], how many table entries refer to each page; 0 = free.
      sinks, window: the full-precision segments; token p lies in window slot (p - sinks) mod slots.
      pool: the packed blocks [layers, pages, ...].
      key_mean: float32 [layers, B, K, H], or None without key centring.
    """

    config: CacheConfig = field(metadata={"static": True})
    capacity: int = field(metadata={"static": True})
    codecs: tuple[Codec, Codec]
    lengths: Int[Array, " B"]
    pending: Int[Array, " B"]
    overflow: Bool[Array, " B"]
    page_table: Int[Array, "B slots"]
    references: Int[Array, " pages"]
    sinks: Exact
    window: Exact
    pool: Blocks
    key_mean: Float[Array, "layers B K H"] | None

    @property
    def nbytes(self) -> int:
        """Bytes of every array of the pytree."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def __repr__(self) -> str:
        c, shape = self.config, getattr(self.lengths, "shape", ("?",))
        return (
            f"Cache(layers={c.num_layers}, batch={shape[0]}, capacity={self.capacity}, "
            f"kv_heads={c.num_kv_heads}, head_dim={c.head_dim}, key={c.key.bits} bits, "
            f"value={c.value.bits} bits, block={c.block}, window={c.window}, sinks={c.sinks}, "
            f"pages={self.references.shape[0]}, nbytes={self.nbytes:,})"
        )


def create(
    config: CacheConfig,
    batch: int,
    capacity: int,
    *,
    key: Array,
    num_pages: int | None = None,
    key_order: Int[Array, "layers K H"] | None = None,
    value_order: Int[Array, "layers K H"] | None = None,
) -> Cache:
    """An empty cache.

    Args:
      config: its static description.
      batch: sequences B.
      capacity: most tokens of one sequence; the whole capacity of every sequence is allocated
        unless `num_pages` is given.
      key: random key of the rotations, shared by all layers and heads.
      num_pages: pages of a pool that the sequences share, given out when blocks are compressed.
      key_order, value_order: channels of each layer and head in the order of the codec's groups,
        outliers first (`outliers.select_channels`).

    Raises:
      ValueError: a batch, capacity or codec that cannot be.
    """
    if batch < 1 or capacity < 1:
        raise ValueError(f"batch and capacity must be positive, got {batch} and {capacity}")
    key_key, value_key = jax.random.split(key)
    codecs = (
        codec.create(key_key, config.key, config.head_dim, key_order),
        codec.create(value_key, config.value, config.head_dim, value_order),
    )
    slots = config.num_blocks(capacity)
    if config.sliding_window is not None:
        slots = min(slots, ceil(config.sliding_window / config.block) + 1)
    dense = num_pages is None
    num_pages = batch * slots if num_pages is None else num_pages
    table = jnp.arange(batch * slots, dtype=jnp.int32).reshape(batch, slots)
    heads, dim = config.num_kv_heads, config.head_dim

    def exact(count: int) -> Exact:
        shape = (config.num_layers, batch, count, heads, dim)
        return Exact(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))

    return Cache(
        config=config,
        capacity=capacity,
        codecs=codecs,
        lengths=jnp.zeros(batch, jnp.int32),
        pending=jnp.zeros(batch, jnp.int32),
        overflow=jnp.zeros(batch, bool),
        page_table=table if dense else jnp.full_like(table, pages.UNASSIGNED),
        references=jnp.full(num_pages, int(dense), jnp.int32),
        sinks=exact(min(config.sinks, capacity)),
        window=exact(max(0, min(config.window + config.block, capacity - config.sinks))),
        pool=blocks.empty(codecs, (config.num_layers, num_pages), heads, config.block),
        key_mean=jnp.zeros((config.num_layers, batch, heads, dim)) if config.center_keys else None,
    )


def begin(cache: Cache, counts: Int[Array, " B"], most: int) -> Cache:
    """Announce `counts` tokens (at most `most`, static), and give pages to the blocks they fill.

    A sequence that would pass the capacity, or for whose blocks there are no pages, gets
    `pending` 0 and `overflow` True; so does one that had overflowed before.
    """
    counts = counts.astype(jnp.int32)
    room = (cache.lengths + counts <= cache.capacity) & ~cache.overflow
    counts = jnp.where(room, counts, 0)
    slot, filled = _new_blocks(cache, counts, most)
    current = jnp.take_along_axis(cache.page_table, slot, axis=1)
    # in a ring of blocks the page of the oldest is used again, unless another sequence shares it
    shared = jnp.where(current == pages.UNASSIGNED, 0, cache.references[current]) > 1
    wanted = filled & ((current == pages.UNASSIGNED) | shared)
    new, granted, references = pages.allocate(cache.references, wanted)
    given = wanted & granted[:, None]
    references = pages.release(references, jnp.where(given, current, pages.UNASSIGNED))
    return replace(
        cache,
        pending=jnp.where(granted, counts, 0),
        overflow=cache.overflow | ~room | ~granted,
        references=references,
        page_table=_put_rows(cache.page_table, slot, new, given),
    )


def write(
    cache: Cache,
    layer: Int[Array, ""] | int,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
) -> Cache:
    """Write the pending tokens of one layer, compressing each block that the window has passed.

    `k` are keys after RoPE. Of row b the first `pending[b]` tokens count, the rest is padding.

    Raises:
      ValueError: keys or values of the wrong shape.
    """
    config, layer = cache.config, jnp.asarray(layer, jnp.int32)
    expected = (cache.lengths.shape[0], k.shape[1], config.num_kv_heads, config.head_dim)
    if k.shape != expected or v.shape != expected:
        raise ValueError(f"keys and values must be {expected}, got {k.shape} and {v.shape}")
    k, v = k.astype(config.dtype), v.astype(config.dtype)
    if cache.page_table.shape[1]:
        cache = _compress(cache, layer, k, v)
    token = jnp.arange(k.shape[1])[None, :]
    position = cache.lengths[:, None] + token
    valid = token < cache.pending[:, None]
    ring = cache.window.keys.shape[2]
    newest = token >= cache.pending[:, None] - ring  # older ones of a long chunk would collide
    in_window = valid & newest & (position >= config.sinks)
    window_slot = (position - config.sinks) % max(ring, 1)

    def put(old: Exact, slot, rows) -> Exact:
        return Exact(
            _put_layer(old.keys, layer, slot, k, rows),
            _put_layer(old.values, layer, slot, v, rows),
        )

    return replace(
        cache,
        sinks=put(cache.sinks, position, valid & (position < config.sinks)),
        window=put(cache.window, window_slot, in_window),
    )


def commit(cache: Cache) -> Cache:
    """Count the pending tokens, which every layer has now written."""
    return replace(
        cache, lengths=cache.lengths + cache.pending, pending=jnp.zeros_like(cache.pending)
    )


def append(
    cache: Cache,
    k: Float[Array, "layers B T K H"],
    v: Float[Array, "layers B T K H"],
    counts: Int[Array, " B"] | None = None,
) -> Cache:
    """Append up to T tokens to each sequence, in all layers.

    `counts` says how many of the T tokens of each sequence count (all, unless given). Appending
    one by one and all at once give the same cache, bit by bit.

    Raises:
      ValueError: keys or values of the wrong shape.
    """
    if k.ndim != 5 or k.shape[0] != cache.config.num_layers:
        raise ValueError(
            f"keys must be [{cache.config.num_layers} layers, B, T, K, H], got {k.shape}"
        )
    batch, most = k.shape[1:3]
    counts = jnp.full(batch, most, jnp.int32) if counts is None else counts

    def step(cache: Cache, xs):
        return write(cache, *xs), None

    layers = jnp.arange(cache.config.num_layers)
    cache, _ = lax.scan(step, begin(cache, counts, most), (layers, k, v))
    return commit(cache)


def _new_blocks(
    cache: Cache, counts: Int[Array, " B"], most: int
) -> tuple[Int[Array, "B n"], Bool[Array, "B n"]]:
    """Slots of the blocks that these tokens complete, and which of the n candidates they are.

    Of more new blocks than a sliding window has slots only the newest count.
    """
    first = cache.config.num_blocks(cache.lengths)
    last = cache.config.num_blocks(cache.lengths + counts)
    slots = cache.page_table.shape[1]
    candidates = ceil(most / cache.config.block) if slots else 0
    block = first[:, None] + jnp.arange(candidates, dtype=jnp.int32)[None, :]
    filled = (block < last[:, None]) & (block >= last[:, None] - slots)
    return block % max(slots, 1), filled


def _compress(cache: Cache, layer, k, v) -> Cache:
    """Compress the blocks that the pending tokens push out of the window."""
    config = cache.config
    slot, filled = _new_blocks(cache, cache.pending, k.shape[1])
    page = jnp.take_along_axis(cache.page_table, slot, axis=1)
    first = config.num_blocks(cache.lengths)
    start = config.sinks + config.block * first
    # the chunk enters the window only after this: the ring still holds what came before
    position = start[:, None] + jnp.arange(slot.shape[1] * config.block)[None, :]
    from_chunk = position >= cache.lengths[:, None]
    chunk_index = jnp.clip(position - cache.lengths[:, None], 0, k.shape[1] - 1)
    ring_index = (position - config.sinks) % cache.window.keys.shape[2]
    opens = (first == 0) & jnp.any(filled, axis=1)

    def gather(ring, chunk):
        old = jnp.take_along_axis(ring[layer], ring_index[..., None, None], axis=1)
        new = jnp.take_along_axis(chunk, chunk_index[..., None, None], axis=1)
        rows = jnp.where(from_chunk[..., None, None], new, old)
        return rows.reshape(*slot.shape, config.block, *rows.shape[2:])

    def encode():
        keys, values = gather(cache.window.keys, k), gather(cache.window.values, v)
        mean = None
        if cache.key_mean is not None:
            of_first = jnp.mean(keys[:, 0].astype(jnp.float32), axis=1)
            mean = jnp.where(opens[:, None, None], of_first, cache.key_mean[layer])
            keys = keys.astype(jnp.float32) - mean[:, None, None, :, :]
        key_codec, value_codec = cache.codecs
        packed = blocks.pack(
            cache.codecs, key_codec.quantize(layer, keys), value_codec.quantize(layer, values)
        )
        return packed, mean

    def skip():
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(encode))

    packed, mean = lax.cond(jnp.any(filled), encode, skip)
    page = jnp.where(filled, page, cache.references.shape[0])  # past the end: dropped
    pool = jax.tree.map(
        lambda all_pages, new: all_pages.at[layer, page].set(new, mode="drop"), cache.pool, packed
    )
    if mean is not None:
        row = jnp.where(opens, jnp.arange(opens.shape[0]), opens.shape[0])
        mean = cache.key_mean.at[layer, row].set(mean, mode="drop")
    return replace(cache, pool=pool, key_mean=mean)


def _put_rows(table, column, value, valid):
    """table[b, column[b, i]] = value[b, i] where valid."""
    row = jnp.broadcast_to(jnp.arange(table.shape[0])[:, None], column.shape)
    column = jnp.where(valid, column, table.shape[1])
    return table.at[row, column].set(value, mode="drop")


def _put_layer(buffer, layer, slot, value, valid):
    """buffer[layer, b, slot[b, i]] = value[b, i] where valid."""
    row = jnp.broadcast_to(jnp.arange(buffer.shape[1])[:, None], slot.shape)
    slot = jnp.where(valid, slot, buffer.shape[2])
    return buffer.at[layer, row, slot].set(value, mode="drop")
