"""From the window into the pool: whole blocks, once the window has passed them.

A chunk is compressed layer by layer while it is at hand. A single token completes at most one
block, which then lies whole in the window: those are compressed once for all layers, by one kernel
where it is served, else in a loop over the sequences that completed one; so a step that completes
none does next to nothing.
"""

from dataclasses import replace
from functools import partial
from math import ceil

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int

from turboquant_jax.cache import blocks, encoding
from turboquant_jax.cache.blocks import Blocks
from turboquant_jax.cache.operands import flat
from turboquant_jax.cache.state import Cache, Exact


def new_blocks(
    cache: Cache, counts: Int[Array, " B"], most: int
) -> tuple[Int[Array, "B n"], Bool[Array, "B n"]]:
    """Slots of the blocks that `counts` tokens complete, and which of the n candidates they are.

    Of more new blocks than a sliding window has slots only the newest count.
    """
    first = cache.config.num_blocks(cache.lengths)
    last = cache.config.num_blocks(cache.lengths + counts)
    slots = cache.page_table.shape[1]
    candidates = ceil(most / cache.config.block) if slots else 0
    block = first[:, None] + jnp.arange(candidates, dtype=jnp.int32)[None, :]
    filled = (block < last[:, None]) & (block >= last[:, None] - slots)
    return block % max(slots, 1), filled


def compress_single(cache: Cache, use_kernel: bool) -> Cache:
    """Compress what the sequences with one pending token completed, in all layers."""
    config = cache.config
    slot, filled = new_blocks(cache, cache.pending, 1)
    complete = filled[:, 0] & (cache.pending == 1)
    rows = jnp.nonzero(complete, size=complete.shape[0], fill_value=0)[0]
    pages = jnp.take_along_axis(cache.pending_pages, slot, axis=1)[:, 0]
    first = config.num_blocks(cache.lengths)
    if use_kernel:
        layers = jnp.arange(config.num_layers, dtype=jnp.int32)[:, None]
        page = pages[None, :] + layers * cache.references.shape[0]
        page = jnp.where(complete[None, :], page, -1)
        row = jnp.arange(page.size, dtype=jnp.int32).reshape(page.shape)
        ring = cache.window.keys.shape[2]
        start, opens = (
            jnp.broadcast_to(x[None, :], page.shape)
            for x in (first * config.block % ring, first == 0)
        )
        window = jax.tree.map(flat, cache.window)
        return encoding.encode(cache, window, _jobs(row, start, page, row, opens))
    layers = jnp.arange(config.num_layers)

    def compress(i, carry):
        pool, means = carry
        row = rows[i]
        place = first[row] * config.block + jnp.arange(config.block)
        place = place % cache.window.keys.shape[2]
        block = Exact(cache.window.keys[:, row, place], cache.window.values[:, row, place])
        mean = None
        if means is not None:
            mean = jnp.where(first[row] == 0, jax.vmap(_mean)(block.keys), means[:, row])
            means = lax.dynamic_update_index_in_dim(means, mean, row, axis=1)
        packed = jax.vmap(partial(_encode, cache.codecs))(layers, block, mean)
        pool = jax.tree.map(
            lambda old, new: lax.dynamic_update_index_in_dim(
                old, _in_order(new), pages[row], axis=1
            ),
            pool,
            packed,
        )
        return pool, means

    pool, means = lax.fori_loop(0, jnp.sum(complete), compress, (cache.pool, cache.key_mean))
    return replace(cache, pool=pool, key_mean=means)


def compress_chunk(cache: Cache, layer: Int[Array, ""], new: Exact, use_kernel: bool) -> Cache:
    """Compress what the sequences with more pending tokens completed, in one layer.

    `new` is the chunk [B, T, K, H], which enters the window only after this.
    """
    slot, filled = new_blocks(cache, cache.pending, new.keys.shape[1])
    filled = filled & (cache.pending > 1)[:, None]
    page = jnp.take_along_axis(cache.pending_pages, slot, axis=1)
    pages = cache.references.shape[0]
    opens = (cache.config.num_blocks(cache.lengths) == 0) & jnp.any(filled, axis=1)
    batch, count = slot.shape

    if use_kernel:
        block = _gather(cache, layer, new, count)
        source = jax.tree.map(lambda x: x.reshape(batch, -1, *x.shape[3:]), block)
        row = jnp.broadcast_to(jnp.arange(batch, dtype=jnp.int32)[:, None], slot.shape)
        start = jnp.broadcast_to(
            cache.config.block * jnp.arange(count, dtype=jnp.int32)[None, :], slot.shape
        )
        page = jnp.where(filled, page + layer * pages, -1)
        columns = row, start, page, layer * batch + row
        first, rest = (
            [column[:, part] for column in columns] for part in (slice(1), slice(1, None))
        )
        # a sequence's first block alone: the kernel takes its mean, which the next ones need
        cache = encoding.encode(cache, source, _jobs(*first, opens))
        if count == 1:
            return cache
        jobs = _jobs(*rest, jnp.zeros_like(rest[0]))
        return encoding.encode(cache, source, jobs)
    page = jnp.where(filled, page, pages)  # past the end: dropped

    def compress(carry):
        pool, means = carry
        block = _gather(cache, layer, new, count)
        mean = None
        if means is not None:
            of_first = jax.vmap(_mean)(block.keys[:, 0])
            mean = jnp.where(opens[:, None, None], of_first, means[layer])
            means = means.at[layer].set(mean)
        encode = partial(_encode, cache.codecs, layer)
        packed = jax.vmap(jax.vmap(encode, in_axes=(0, None)))(block, mean)
        pool = jax.tree.map(
            lambda old, rows: old.at[layer, page].set(rows, mode="drop"), pool, packed
        )
        return pool, means

    pool, means = lax.cond(
        jnp.any(filled), compress, lambda carry: carry, (cache.pool, cache.key_mean)
    )
    return replace(cache, pool=pool, key_mean=means)


def _jobs(*columns: Array) -> Int[Array, "jobs 5"]:
    return jnp.stack([column.astype(jnp.int32).ravel() for column in columns], axis=1)


def _gather(cache: Cache, layer: Int[Array, ""], new: Exact, count: int) -> Exact:
    """The next `count` blocks [B, count, block, K, H] of each sequence, from window and chunk."""
    config = cache.config
    start = config.sinks + config.block * config.num_blocks(cache.lengths)
    position = start[:, None] + jnp.arange(count * config.block)[None, :]
    in_chunk = position - cache.lengths[:, None]
    ring = (position - config.sinks) % cache.window.keys.shape[2]

    def take(window: Float[Array, "layers B slots K H"], chunk: Float[Array, "B T K H"]):
        index = jnp.clip(in_chunk, 0, chunk.shape[1] - 1)
        late = jnp.take_along_axis(chunk, index[..., None, None], axis=1)
        early = jnp.take_along_axis(window[layer], ring[..., None, None], axis=1)
        rows = jnp.where((in_chunk >= 0)[..., None, None], late, early)
        return rows.reshape(rows.shape[0], count, config.block, *rows.shape[2:])

    return jax.tree.map(take, cache.window, new)


def _in_order(x: Array) -> Array:
    """The array, laid out as it is written down.

    Left to choose, XLA on a GPU turns the whole pool around to the layout that the values of a
    block come in, and back behind the loop.
    """
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _mean(keys: Float[Array, "T K H"]) -> Float[Array, "K H"]:
    return jnp.mean(keys.astype(jnp.float32), axis=0)


def _encode(
    codecs, layer: Int[Array, ""], block: Exact, mean: Float[Array, "K H"] | None
) -> Blocks:
    """One block of one layer, [T, K, H]: the same arithmetic for a chunk and for single tokens."""
    key_codec, value_codec = codecs
    keys = block.keys if mean is None else block.keys.astype(jnp.float32) - mean[None]
    return blocks.pack(
        codecs, key_codec.quantize(layer, keys), value_codec.quantize(layer, block.values)
    )
