"""How tokens enter the cache. Appending has three parts: a decoder can write layer by layer.

    cache = begin(cache, counts, most)           # how many tokens come; pages for new blocks
    cache = write(cache, layer, k, v)            # once a layer, after that layer's attention
    cache = commit(cache)                        # the tokens count from now on

and `append` does all of it. Nothing is ever overwritten for lack of room: a sequence that does not
fit is left as it was, and `overflow` says so.

Tokens that may be taken back, as those of a draft, are proposed: they wait in a scratch of their
own, pages are given when it is known which stay, and the others leave no trace in any bit.

    cache = propose(cache, counts, most)         # how many tokens come; a scratch for them
    cache = write(cache, layer, k, v)            # as before
    cache = commit(cache, accepted)              # of each sequence the first `accepted` stay
"""

from dataclasses import replace

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from turboquant_jax.cache import compression, pages
from turboquant_jax.cache.choose import Compression, choose_compression
from turboquant_jax.cache.state import Cache, Exact, LayerRows, rows_of
from turboquant_jax.implementation import Implementation


def begin(cache: Cache, counts: Int[Array, " B"], most: int) -> Cache:
    """Announce `counts` tokens (at most `most`, static), and give pages to the blocks they fill.

    A sequence that would pass the capacity, or for whose blocks there are no pages, gets
    `pending` 0 and `overflow` True; so does one that had overflowed before, and one whose count is
    negative or more than `most`.
    """
    table, layout = cache.table, cache.layout
    counts = counts.astype(jnp.int32)
    fits = (counts >= 0) & (counts <= most) & (table.lengths + counts <= cache.capacity)
    fits = fits & ~table.overflow
    counts = jnp.where(fits, counts, 0)
    slot, filled = layout.completed(table.lengths, counts, most)
    current = jnp.take_along_axis(table.page_table, slot, axis=1)
    page, granted, references = pages.assign(table.references, current, filled)
    if cache.share is not None:  # the pages of a sequence on all shares, or on none
        agreed = lax.pmin(granted.astype(jnp.int32), cache.share.axis) > 0
        fits, counts = fits & agreed, jnp.where(agreed, counts, 0)
        filled = filled & agreed[:, None]
        page, granted, references = pages.assign(table.references, current, filled)
    row = jnp.broadcast_to(jnp.arange(slot.shape[0])[:, None], slot.shape)
    slot = jnp.where(filled & granted[:, None], slot, layout.slots)  # or: dropped
    return cache.with_table(
        pending=jnp.where(granted, counts, 0),
        overflow=table.overflow | ~fits | ~granted,
        references=references,
        pending_pages=table.pending_pages.at[row, slot].set(page, mode="drop"),
    )


def propose(cache: Cache, counts: Int[Array, " B"], most: int) -> Cache:
    """Announce `counts` tokens (at most `most`, static) of which `commit` keeps the first ones.

    What does not fit is as in `begin`, but pages: those are given, or missing, at `commit`.

    Raises:
      ValueError: more tokens than a block, or fewer than one.
    """
    if not 1 <= most <= cache.config.block:
        raise ValueError(f"most: got {most} tokens, expected 1 to a block's {cache.config.block}")
    counts = counts.astype(jnp.int32)
    table, shape = cache.table, (*cache.window.keys.shape[:2], most, *cache.window.keys.shape[3:])
    fits = (counts >= 0) & (counts <= most) & (table.lengths + counts <= cache.capacity)
    fits = fits & ~table.overflow
    empty = jnp.zeros(shape, cache.config.dtype)
    cache = replace(cache, scratch=Exact(empty, empty))
    return cache.with_table(pending=jnp.where(fits, counts, 0), overflow=table.overflow | ~fits)


def write(
    cache: Cache,
    layer: Int[Array, ""] | int,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    implementation: Implementation | None = None,
) -> Cache:
    """Write the pending tokens of one layer.

    `k` are keys after RoPE. Of row b the first `pending[b]` tokens count, the rest is padding. Of a
    chunk (T > 1), the blocks that the window passes are compressed here, while the chunk is at
    hand; a single token (T = 1) is one row, and what it completes `commit` compresses.

    `implementation` says who compresses: "xla" is the definition, "pallas" the GPU kernel, None the
    kernel where it is served.

    Raises:
      ValueError: keys or values of the wrong shape, or an unknown implementation.
      NotImplementedError: an implementation that this device or cache is not served by.
    """
    by = choose_compression(cache, implementation)
    return write_layer(cache, rows_of(cache, layer), k, v, by)


def write_layer(
    cache: Cache,
    rows: LayerRows,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    by: Compression,
) -> Cache:
    """`write` for a layer that is found, by what was chosen."""
    dtype, length = cache.config.dtype, cache.lengths
    expected = (length.shape[0], k.shape[1], cache.kv_heads, cache.config.head_dim)
    if k.shape != expected or v.shape != expected:
        raise ValueError(f"keys and values: got {k.shape} and {v.shape}, expected {expected}")
    new = Exact(k.astype(dtype), v.astype(dtype))
    if cache.scratch is not None:
        return replace(cache, scratch=_put_aside(cache.scratch, rows.layer, new))
    if cache.layout.slots and k.shape[1] > 1:
        cache = compression.compress_chunk(cache, rows, new, by)
    token = jnp.arange(k.shape[1])[None, :]
    sink, window = cache.layout.written(length[:, None], cache.table.pending[:, None], token)
    return replace(
        cache,
        sinks=_put(cache.sinks, rows.layer, sink, new),
        window=_put(cache.window, rows.layer, window, new),
    )


def commit(
    cache: Cache,
    accepted: Int[Array, " B"] | None = None,
    *,
    implementation: Implementation | None = None,
) -> Cache:
    """Count the pending tokens, which every layer has now written; see `write`.

    Of proposed ones the first `accepted` of each sequence (all, unless given): the cache is, bit by
    bit, the one that they alone were appended to. More than are pending, or fewer than 0, raise
    `overflow`, as pages do that are not there.

    Raises:
      ValueError: `accepted` of tokens that were not proposed.
    """
    if cache.scratch is not None:
        cache = _keep(cache, cache.scratch, accepted, implementation)
    elif accepted is not None:
        raise ValueError("accepted: got it for tokens that are written, expected proposed ones")
    elif cache.layout.slots:
        by = choose_compression(cache, implementation)
        cache = compression.compress_single(cache, by)
    table = cache.table
    given = table.pending_pages != pages.UNASSIGNED
    return cache.with_table(
        lengths=table.lengths + table.pending,
        pending=jnp.zeros_like(table.pending),
        page_table=jnp.where(given, table.pending_pages, table.page_table),
        pending_pages=jnp.full_like(table.pending_pages, pages.UNASSIGNED),
    )


def append(
    cache: Cache,
    k: Float[Array, "layers B T K H"],
    v: Float[Array, "layers B T K H"],
    counts: Int[Array, " B"] | None = None,
    *,
    implementation: Implementation | None = None,
) -> Cache:
    """Append up to T tokens to each sequence, in all layers.

    `counts` says how many of the T tokens of each sequence count (all, unless given). Appending
    one by one and all at once give the same cache, bit by bit. `implementation`: see `write`.

    Raises:
      ValueError: keys or values of the wrong shape.
    """
    layers = cache.num_layers
    if k.ndim != 5 or k.shape[0] != layers or k.shape != v.shape:
        raise ValueError(
            f"keys and values: got {k.shape} and {v.shape}, expected [{layers} layers, B, T, K, H]"
        )
    batch, most = k.shape[1:3]
    counts = jnp.full(batch, most, jnp.int32) if counts is None else counts
    cache = begin(cache, counts, most)

    def step(cache: Cache, xs):
        return write(cache, *xs, implementation=implementation), None

    if len(cache.parts) == 1:
        cache, _ = lax.scan(step, cache, (jnp.arange(layers), k, v))
    else:  # layers that differ cannot be scanned
        for layer in range(layers):
            cache = write(cache, layer, k[layer], v[layer], implementation=implementation)
    return commit(cache, implementation=implementation)


def _keep(
    cache: Cache,
    scratch: Exact,
    accepted: Int[Array, " B"] | None,
    implementation: Implementation | None,
) -> Cache:
    """Move what stays from the scratch to where pending tokens lie before `commit` counts them."""
    table, layout, most = cache.table, cache.layout, scratch.keys.shape[2]
    accepted = table.pending if accepted is None else accepted.astype(jnp.int32)
    counts = jnp.where(accepted > table.pending, -1, accepted)
    cache = begin(replace(cache, scratch=None), counts, most)
    length, pending = cache.lengths, cache.table.pending
    token = jnp.arange(most, dtype=jnp.int32)[None, :]
    sink, window = layout.written(length[:, None], pending[:, None], token)
    cache = replace(cache, sinks=_put(cache.sinks, slice(None), sink, scratch))
    if not layout.slots:
        return replace(cache, window=_put(cache.window, slice(None), window, scratch))
    # tokens behind the one that completes a block may belong where it begins: they come after it
    late = token >= layout.until_block(length)[:, None]
    early = jnp.where(late, layout.ring, window)
    cache = replace(cache, window=_put(cache.window, slice(None), early, scratch))
    cache = compression.compress_kept(cache, choose_compression(cache, implementation))
    late = jnp.where(late, window, layout.ring)
    return replace(cache, window=_put(cache.window, slice(None), late, scratch))


def _put_aside(scratch: Exact, layer: Int[Array, ""], new: Exact) -> Exact:
    """The tokens of a layer, in a scratch."""
    if new.keys.shape[1] != scratch.keys.shape[2]:
        raise ValueError(
            f"tokens: got {new.keys.shape[1]} of each sequence, expected the "
            f"{scratch.keys.shape[2]} that were proposed"
        )
    return Exact(scratch.keys.at[layer].set(new.keys), scratch.values.at[layer].set(new.values))


def _put(old: Exact, layer, slot: Int[Array, "B T"], new: Exact) -> Exact:
    """old[layer, b, slot[b, i]] = new[b, i], of a layer or of a slice; none past the end."""
    row = jnp.broadcast_to(jnp.arange(slot.shape[0])[:, None], slot.shape)
    return Exact(
        old.keys.at[layer, row, slot].set(new.keys, mode="drop"),
        old.values.at[layer, row, slot].set(new.values, mode="drop"),
    )
