"""How tokens enter the cache. Appending has three parts: a decoder can write layer by layer.

    cache = begin(cache, counts, most)           # how many tokens come; pages for new blocks
    cache = write(cache, layer, k, v)            # once a layer, after that layer's attention
    cache = commit(cache)                        # the tokens count from now on

and `append` does all of it. Nothing is ever overwritten for lack of room: a sequence that does not
fit is left as it was, and `overflow` says so.
"""

from dataclasses import replace
from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from turboquant_jax.cache import compression, encoding, pages
from turboquant_jax.cache.state import Cache, Exact

Implementation = Literal["xla", "pallas"]


def begin(cache: Cache, counts: Int[Array, " B"], most: int) -> Cache:
    """Announce `counts` tokens (at most `most`, static), and give pages to the blocks they fill.

    A sequence that would pass the capacity, or for whose blocks there are no pages, gets
    `pending` 0 and `overflow` True; so does one that had overflowed before, and one whose count is
    negative or more than `most`.
    """
    counts = counts.astype(jnp.int32)
    fits = (counts >= 0) & (counts <= most) & (cache.lengths + counts <= cache.capacity)
    fits = fits & ~cache.overflow
    counts = jnp.where(fits, counts, 0)
    slot, filled = compression.new_blocks(cache, counts, most)
    current = jnp.take_along_axis(cache.page_table, slot, axis=1)
    page, granted, references = pages.assign(cache.references, current, filled)
    row = jnp.broadcast_to(jnp.arange(slot.shape[0])[:, None], slot.shape)
    slot = jnp.where(filled & granted[:, None], slot, cache.page_table.shape[1])  # or: dropped
    return replace(
        cache,
        pending=jnp.where(granted, counts, 0),
        overflow=cache.overflow | ~fits | ~granted,
        references=references,
        pending_pages=cache.pending_pages.at[row, slot].set(page, mode="drop"),
    )


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
    config, layer = cache.config, jnp.asarray(layer, jnp.int32)
    expected = (cache.lengths.shape[0], k.shape[1], config.num_kv_heads, config.head_dim)
    if k.shape != expected or v.shape != expected:
        raise ValueError(f"keys and values must be {expected}, got {k.shape} and {v.shape}")
    new = Exact(k.astype(config.dtype), v.astype(config.dtype))
    if cache.page_table.shape[1] and k.shape[1] > 1:
        cache = compression.compress_chunk(cache, layer, new, _kernel(implementation, cache))
    token = jnp.arange(k.shape[1])[None, :]
    position = cache.lengths[:, None] + token
    valid = token < cache.pending[:, None]
    ring = cache.window.keys.shape[2]
    newest = token >= cache.pending[:, None] - ring  # older ones of a long chunk would collide
    in_window = valid & newest & (position >= config.sinks)
    window_slot = (position - config.sinks) % max(ring, 1)
    return replace(
        cache,
        sinks=_put(cache.sinks, layer, position, new, valid & (position < config.sinks)),
        window=_put(cache.window, layer, window_slot, new, in_window),
    )


def commit(cache: Cache, *, implementation: Implementation | None = None) -> Cache:
    """Count the pending tokens, which every layer has now written; see `write`."""
    if cache.page_table.shape[1]:
        cache = compression.compress_single(cache, _kernel(implementation, cache))
    given = cache.pending_pages != pages.UNASSIGNED
    return replace(
        cache,
        lengths=cache.lengths + cache.pending,
        pending=jnp.zeros_like(cache.pending),
        page_table=jnp.where(given, cache.pending_pages, cache.page_table),
        pending_pages=jnp.full_like(cache.pending_pages, pages.UNASSIGNED),
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
    if k.ndim != 5 or k.shape[0] != cache.config.num_layers or k.shape != v.shape:
        raise ValueError(
            f"keys and values must be [{cache.config.num_layers} layers, B, T, K, H], "
            f"got {k.shape} and {v.shape}"
        )
    batch, most = k.shape[1:3]
    counts = jnp.full(batch, most, jnp.int32) if counts is None else counts

    def step(cache: Cache, xs):
        return write(cache, *xs), None

    layers = jnp.arange(cache.config.num_layers)
    cache, _ = lax.scan(step, begin(cache, counts, most), (layers, k, v))
    return commit(cache)


def _kernel(implementation: Implementation | None, cache: Cache) -> bool:
    """Whether the kernel compresses: a name is obeyed or refused."""
    if implementation not in ("xla", "pallas", None):
        raise ValueError(f"implementation must be 'xla', 'pallas' or None, got {implementation!r}")
    reason = encoding.unserved(cache)
    if implementation == "pallas" and reason is not None:
        raise NotImplementedError(f"implementation='pallas' got {reason}")
    return implementation != "xla" and reason is None


def _put(old: Exact, layer, slot: Int[Array, "B T"], new: Exact, valid) -> Exact:
    """old[layer, b, slot[b, i]] = new[b, i] where valid."""
    row = jnp.broadcast_to(jnp.arange(slot.shape[0])[:, None], slot.shape)
    slot = jnp.where(valid, slot, old.keys.shape[2])  # past the end: dropped
    return Exact(
        old.keys.at[layer, row, slot].set(new.keys, mode="drop"),
        old.values.at[layer, row, slot].set(new.values, mode="drop"),
    )
