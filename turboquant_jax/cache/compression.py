"""From the window into the pool: whole blocks, once the window has passed them.

A chunk is compressed layer by layer while it is at hand. A single token completes at most one
block, which then lies whole in the window: those are compressed once for all layers, by one kernel
where it is served, else in a loop over the sequences that completed one; so a step that completes
none does next to nothing.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout as MemoryLayout
from jax.experimental.layout import with_layout_constraint
from jaxtyping import Array, Bool, Float, Int

from turboquant_jax.cache import blocks, encoding, pre_rope
from turboquant_jax.cache.blocks import Blocks
from turboquant_jax.cache.choose import Compression
from turboquant_jax.cache.pre_rope import Phases
from turboquant_jax.cache.state import Cache, Exact, LayerRows, Part, heads_of
from turboquant_jax.implementation import Implementation


def compress_single(cache: Cache, by: Compression) -> Cache:
    """Compress what the sequences with one pending token completed, in all layers."""
    table = cache.table
    slot, filled = cache.layout.completed(table.lengths, table.pending, 1)
    single = table.pending == 1
    cache = _open_means(cache, slice(None), single, lambda: _first_of_window(cache))
    return _compress_window(cache, slot, filled[:, 0] & single, by)


def compress_kept(cache: Cache, by: Compression) -> Cache:
    """Compress what the pending tokens completed, at most a block a sequence, in all layers.

    The block is whole in the window: no token behind it has been written there.
    """
    table = cache.table
    slot, filled = cache.layout.completed(table.lengths, table.pending, 1)
    cache = _open_means(cache, slice(None), table.pending > 0, lambda: _first_of_window(cache))
    return _compress_window(cache, slot, filled[:, 0], by)


def _compress_window(
    cache: Cache, slot: Int[Array, "B 1"], complete: Bool[Array, " B"], by: Compression
) -> Cache:
    """Compress the oldest block of the window of some sequences, to the page pending in `slot`."""
    config, table, layout = cache.config, cache.table, cache.layout
    pages = jnp.take_along_axis(table.pending_pages, slot, axis=1)[:, 0]
    first = layout.num_blocks(table.lengths)
    start, first = layout.window_slot(layout.block_start(first)), layout.number(first)
    opens = _opens(cache, first)
    if by.blocks == "pallas":
        return encoding.encode_window(cache, start, jnp.where(complete, pages, -1), first)
    rows = jnp.nonzero(complete, size=complete.shape[0], fill_value=0)[0]

    def compress(i, carry):
        pools, means = carry
        row = rows[i]
        place = (start[row] + jnp.arange(config.block)) % layout.ring
        block = Exact(cache.window.keys[:, row, place], cache.window.values[:, row, place])
        if means is not None:
            of_first = jax.vmap(partial(pre_rope.mean_key, phases=cache.phases))(block.keys)
            mean = jnp.where(opens[row], of_first, means[:, row])
            means = lax.dynamic_update_index_in_dim(means, mean, row, axis=1)
        found = []
        for number, (part, pool) in enumerate(zip(cache.parts, pools, strict=True)):
            own = partial(_rows_of_part, cache, number)
            mean_rows = None if means is None else own(mean[:, None])[0]
            packed = _encode(
                part, jnp.arange(pool.scales[0].shape[0]), by.search, cache.phases,
                jax.tree.map(own, block), mean_rows, first[row],
            )  # fmt: skip
            found.append(
                jax.tree.map(
                    lambda old, new: lax.dynamic_update_index_in_dim(
                        old, _in_order(new), pages[row], axis=1
                    ),
                    pool,
                    packed,
                )
            )
        return tuple(found), means

    pools = tuple(part.pool for part in cache.parts)
    pools, means = lax.fori_loop(0, jnp.sum(complete), compress, (pools, cache.key_mean))
    return with_pools(replace(cache, key_mean=means), pools)


def compress_chunk(cache: Cache, rows: LayerRows, new: Exact, by: Compression) -> Cache:
    """Compress what the sequences with more pending tokens completed, in one layer.

    `new` is the chunk [B, T, K, H], which enters the window only after this.
    """
    table, layer = cache.table, rows.layer
    slot, filled = cache.layout.completed(table.lengths, table.pending, new.keys.shape[1])
    filled = filled & (table.pending > 1)[:, None]
    page = jnp.take_along_axis(table.pending_pages, slot, axis=1)
    block_here = cache.layout.num_blocks(table.lengths)[:, None]
    block_here = block_here + jnp.arange(slot.shape[1], dtype=jnp.int32)[None, :]
    number = cache.layout.number(block_here)
    start = cache.layout.block_start(block_here)

    def first_block() -> Float[Array, "B block K H"]:
        begin = jnp.full((slot.shape[0], 1), cache.config.sinks, jnp.int32)
        return _gather(cache, layer, new, begin).keys[:, 0]

    cache = _open_means(cache, layer, table.pending > 1, first_block)
    opens = _opens(cache, number[:, 0]) & jnp.any(filled, axis=1)
    if by.blocks == "pallas":
        block = _gather(cache, layer, new, start)
        return encoding.encode_chunk(cache, rows, block, jnp.where(filled, page, -1), number)
    page = jnp.where(filled, page, table.references.shape[0])  # past the end: dropped

    def compress(carry):
        pools, means = carry
        block = _gather(cache, layer, new, start)
        if means is not None:
            of_first = jax.vmap(partial(pre_rope.mean_key, phases=cache.phases))(block.keys[:, 0])
            mean = jnp.where(opens[:, None, None], of_first, means[layer])
            means = means.at[layer].set(mean)
        found = list(pools)
        for member in rows.members:
            own = member.of(cache.kv_heads)
            encode = partial(_encode, cache.parts[member.part], own, by.search, cache.phases)
            some = jax.tree.map(partial(member.pick, axis=-2), block)
            mean_rows = None if means is None else member.pick(mean, axis=-2)
            packed = jax.vmap(jax.vmap(encode, in_axes=(0, None, 0)))(some, mean_rows, number)
            place = own[:, None, None], page[None]
            found[member.part] = jax.tree.map(
                lambda old, new, place=place: old.at[place].set(
                    jnp.moveaxis(new, 2, 0), mode="drop"
                ),
                found[member.part],
                packed,
            )
        return tuple(found), means

    pools = tuple(part.pool for part in cache.parts)
    pools, means = lax.cond(jnp.any(filled), compress, lambda carry: carry, (pools, cache.key_mean))
    return with_pools(replace(cache, key_mean=means), pools)


def with_pools(cache: Cache, pools: tuple[Blocks, ...]) -> Cache:
    """The cache with other blocks."""
    parts = (replace(part, pool=pool) for part, pool in zip(cache.parts, pools, strict=True))
    return replace(cache, parts=tuple(parts))


def _rows_of_part(
    cache: Cache, part: int, x: Float[Array, "layers T K H"]
) -> Float[Array, "T rows H"]:
    """[T, rows, H] of the layers and heads of a part."""
    if len(cache.parts) == 1:
        return jnp.moveaxis(x, 1, 0).reshape(x.shape[1], -1, x.shape[3])
    layer, head = (
        jnp.asarray(index)
        for index in zip(*heads_of(cache.config, part, cache.kv_heads), strict=True)
    )
    return jnp.moveaxis(x, 1, 0)[:, layer, head]


def _opens(cache: Cache, number: Int[Array, " B"]) -> Bool[Array, " B"]:
    """Whether the mean is taken with the block of this number: those of shares are there before."""
    return (number == 0) & (cache.share is None)


def _open_means(
    cache: Cache,
    layers: Int[Array, ""] | slice,
    which: Bool[Array, " B"],
    first_block: Callable[[], Float[Array, "*layers B block K H"]],
) -> Cache:
    """With the means of sequences whose first block is completed, on every share of them.

    Only one share has that block, and all of them need its mean.
    """
    if cache.share is None or cache.key_mean is None:
        return cache
    table, blocks = cache.table, cache.config.num_blocks
    opens = which & (blocks(table.lengths) == 0) & (blocks(table.lengths + table.pending) > 0)

    keys, mean_of = first_block(), partial(pre_rope.mean_key, phases=cache.phases)
    for _ in keys.shape[:-3]:
        mean_of = jax.vmap(mean_of)
    old = cache.key_mean[layers]
    mean = jnp.where(opens[:, None, None], mean_of(keys), old)
    if not isinstance(layers, slice):  # of all layers a scatter without indices: XLA ends in a
        mean = cache.key_mean.at[layers].set(mean)  # segmentation fault under `shard_map`
    return replace(cache, key_mean=mean)


def _first_of_window(cache: Cache) -> Float[Array, "layers B block K H"]:
    """Keys of the first block of sequences that have none yet: the ring begins with it."""
    return cache.window.keys[:, :, : cache.config.block]


def _gather(cache: Cache, layer: Int[Array, ""], new: Exact, start: Int[Array, "B n"]) -> Exact:
    """Blocks [B, n, block, K, H] from these positions on, out of window and chunk."""
    config, layout, lengths = cache.config, cache.layout, cache.lengths
    position = start[:, :, None] + jnp.arange(config.block)[None, None, :]
    position = position.reshape(start.shape[0], -1)
    in_chunk = position - lengths[:, None]
    ring = layout.window_slot(position)

    def take(
        window: Float[Array, "layers B slots K H"], chunk: Float[Array, "B T K H"]
    ) -> Float[Array, "B count block K H"]:
        index = jnp.clip(in_chunk, 0, chunk.shape[1] - 1)
        late = jnp.take_along_axis(chunk, index[..., None, None], axis=1)
        early = jnp.take_along_axis(window[layer], ring[..., None, None], axis=1)
        rows = jnp.where((in_chunk >= 0)[..., None, None], late, early)
        return rows.reshape(*start.shape, config.block, *rows.shape[2:])

    return jax.tree.map(take, cache.window, new)


def _in_order(x: Array) -> Array:
    """The array, laid out as it is written down.

    Left to choose, XLA on a GPU turns the whole pool around to the layout that the values of a
    block come in, and back behind the loop.
    """
    return with_layout_constraint(x, MemoryLayout(tuple(range(x.ndim))))


def _encode(
    part: Part,
    rows: Int[Array, " K"],
    search: Implementation,
    phases: Phases | None,
    block: Exact,
    mean: Float[Array, "K H"] | None,
    number: Int[Array, ""],
) -> Blocks:
    """Block `number` of a sequence, some rows of it [T, K, H]: the same arithmetic for a chunk and
    for single tokens.
    """
    key_codec, value_codec = part.codecs
    keys, tokens = block.keys, block.keys.shape[0]
    if mean is not None:
        index = number * tokens + jnp.arange(tokens, dtype=jnp.int32)
        keys = pre_rope.center(keys, mean, phases, index)
    return blocks.pack(
        part.codecs,
        key_codec.quantize(rows, keys, search),
        value_codec.quantize(rows, block.values, search),
        scale_bits=8 if part.pool.bases else 16,
    )
