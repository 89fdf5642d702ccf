"""Attention of a chunk over itself and over the compressed past, by the vendor's kernel.

Three segments, joined by their log-sum-exp: the chunk, causally; sinks and window; and the
compressed blocks, a tile at a time, which is decoded to 16 bits in the rotated space, read once and
forgotten. So the past is never there in full precision, however long it is. Behind a sliding window
the past is short, and another module's: `local_past`.

Keys that were centred before RoPE get their mean back in the tile, turned and rotated, before they
are rounded to its 16 bits: about the error that keys in full precision have in these bits.

A tile is long and narrow: as few kv heads as give the device enough query rows, and many tokens. It
takes no more memory than a short one of all heads, and merging, which is a pass over the outputs so
far, is rare. Tiles that all sequences fill are attended to without a mask, which would cost the
vendor's kernel 8 % of its speed.

What the vendor makes of NaN is unknown, and 0 * NaN in a masked place is NaN. So it is given
nothing that is not finite, but in blocks that are seen. Which outputs are spoilt is found beside
it, from the largest magnitudes of queries and keys: also those whose scores might overflow.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from turboquant_jax.attention import (
    head_rotation,
    kernel_call,
    local_past,
    not_finite,
    tensor_cores,
    triton,
)
from turboquant_jax.attention.projection import Heads
from turboquant_jax.attention.segments import Scores, SegmentPart, merge, over_shares, sink_part
from turboquant_jax.cache import blocks, pre_rope
from turboquant_jax.cache.layout import locate
from turboquant_jax.cache.state import Cache, LayerRows
from turboquant_jax.implementation import Implementation

# Tokens of a tile. Longer ones are merged less often; what no whole tile covers is masked.
TILE = 32768
# Query rows of one call: 128 for each of the 132 multiprocessors are enough.
ROWS = 16384
# Most groups of heads: each is compiled on its own.
GROUPS = 4
# What `jax.nn.dot_product_attention` calls it; "xla" computes the same on a CPU.
VENDOR: Literal["cudnn", "xla"] = "cudnn"


def attend(
    cache: Cache,
    rows: LayerRows,
    heads: Heads,
    scores: Scores,
    sink_logits: Float[Array, " N"] | None,
    *,
    decode_by: Implementation,
    empty: bool = False,
) -> Float[Array, "B T N H"]:
    """What `api.attend` says, with operands in the cache's 16 bits; no cap."""
    q, k, v = heads
    config = cache.config
    scale = scores.factor(config.head_dim)
    queries, keys, values = (x.astype(config.dtype) for x in (q, k, v))
    reach = not_finite.reach(queries)
    queries = jnp.where(jnp.isfinite(reach)[..., None], queries, 0)
    keys, values, *own = not_finite.clean(keys, values)
    sinks = [] if sink_logits is None else [sink_part(sink_logits, q.shape)]
    segment = partial(_segment, scale)
    decode = partial(triton.decode_pages if decode_by == "pallas" else _decode_pages, cache, rows)
    window = _window(cache, q.shape[1])
    if window is None:
        seen = not_finite.seen_so_far
        over_past = partial(_over_past, cache, rows, queries, segment, scale, decode)
    else:
        seen = partial(not_finite.seen_in_window, window)
        over_past = partial(local_past.attend, cache, rows, queries, window, segment, decode)

    def merged(parts: list[SegmentPart], *past):
        """The output, NaN where the past or the chunk up to the query's token spoils it."""
        group = q.shape[2] // cache.kv_heads
        largest, bad = (jnp.repeat(x, group, axis=2) for x in seen(*own, *past))
        finite = jnp.isfinite(reach * (config.head_dim * largest))[..., None] & ~bad
        return jnp.where(finite, merge(parts + sinks)[0], jnp.nan).astype(q.dtype)

    def alone():
        return segment(queries, keys, values, is_causal=True, window=window)

    def with_past():
        parts, reach_of_past, bad_past = over_past()
        if (share := cache.share) is not None:
            parts = [over_shares(merge(parts), share)]
            reach_of_past = lax.pmax(reach_of_past, share.axis)
            bad_past = lax.pmax(bad_past.astype(jnp.int32), share.axis) > 0
        return merged([alone(), *parts], reach_of_past, bad_past)

    if empty:
        return merged([alone()])
    # each branch goes all the way to the output: what leaves a branch is copied
    return lax.cond(jnp.any(cache.lengths > 0), with_past, lambda: merged([alone()]))


def _window(cache: Cache, count: int) -> int | None:
    """Tokens that a query sees, itself included; None if every query of a chunk sees all."""
    window = cache.config.sliding_window
    return None if window is None or window >= cache.capacity + count else window


def _over_past(
    cache: Cache, rows: LayerRows, queries, segment, scale: float, decode
) -> tuple[list[SegmentPart], Float[Array, "B K"], Bool[Array, "B K H"]]:
    """The whole past: sinks and window, and the compressed blocks; what of it is not finite."""
    held, reach, bad = _exact(cache, rows)
    parts = [segment(queries, *held)]
    if cache.layout.slots:
        parts.append(_over_blocks(cache, rows, queries, segment, scale, decode))
        reach = jnp.maximum(reach, not_finite.reach_of_blocks(cache, rows))
        if not cache.config.value.coded:
            bad = bad | not_finite.bad_values_of_blocks(cache, rows)
    return parts, reach, bad


def _segment(
    scale: float, q, k, v, count=None, *, is_causal: bool = False, window: int | None = None
) -> SegmentPart:
    """All tokens, or of each sequence the first `count`, which may be none.

    A query sees the newest `window` of them, where that is given: itself included, if causal.
    """
    local = None if window is None or window >= q.shape[1] else (window - 1, 0)
    mask = None if count is None else jnp.maximum(count, 1)
    output, lse = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=is_causal,
        key_value_seq_lengths=mask,
        local_window_size=local,
        implementation=VENDOR,
        return_residual=True,
    )
    lse = lse.astype(jnp.float32)
    return output, lse if count is None else jnp.where((count > 0)[:, None, None], lse, -jnp.inf)


def _exact(cache: Cache, rows: LayerRows):
    """Keys and values [B, S, K, H] of sinks and window in order, and how many there are; their

    reach [B, K], and where a value was not finite [B, K, H].
    """
    layout = cache.layout
    place = locate(layout, cache.lengths, jnp.zeros_like(cache.lengths))
    slot = (place.window.first[:, None] + jnp.arange(layout.ring)[None, :]) % max(layout.ring, 1)

    def in_order(sinks, window):
        index = slot[:, :, None, None]
        ordered = jnp.take_along_axis(window[rows.layer], index, axis=1)
        return jnp.concatenate([sinks[rows.layer], ordered], axis=1)

    keys, values = (
        in_order(getattr(cache.sinks, name), getattr(cache.window, name))
        for name in ("keys", "values")
    )
    count = place.sinks.count + jnp.maximum(place.window.count, 0)
    keys, values, reach, bad = not_finite.clean(keys, values)
    seen = (jnp.arange(keys.shape[1])[None, :] < count[:, None])[..., None]
    reach = jnp.max(jnp.where(seen, reach, 0.0), axis=1, initial=0.0)
    return (keys, values, count), reach, jnp.any(bad & seen[..., None], axis=1)


def _over_blocks(
    cache: Cache, rows: LayerRows, queries, segment, scale: float, decode
) -> SegmentPart:
    """The compressed blocks, tile by tile in the rotated space."""
    config, slots, kv_heads = cache.config, cache.layout.slots, cache.kv_heads
    batch, count, heads, dim = queries.shape
    keys_of, values_of = (kernel_call.codecs_of(cache, rows, side) for side in (0, 1))
    groups = _groups(kv_heads, batch * count * heads, ROWS)
    own = np.arange(kv_heads, dtype=np.int32).reshape(groups, -1)
    rotated = head_rotation.rotate_by_member(tensor_cores.rotate, rows, keys_of, queries, kv_heads)
    rotated = rotated.astype(queries.dtype).reshape(batch, count, groups, -1, dim)
    by_group = [rotated[:, :, g] for g in range(groups)]  # once, not in every turn of the loops
    tokens = cache.layout.compressed_tokens(cache.lengths)
    pages = min(slots, max(1, TILE // config.block))
    table = jnp.pad(jnp.maximum(cache.table.page_table, 0), ((0, 0), (0, pages)))

    def attend_to(i, masked: bool) -> list[SegmentPart]:
        """Tile i, group by group."""
        page = lax.dynamic_slice_in_dim(table, i * pages, pages, axis=1)
        size = pages * config.block
        held = jnp.clip(tokens - i * size, 0, size)
        seen = (jnp.arange(size)[None, :] < held[:, None])[..., None, None]
        parts = []
        for q, g in zip(by_group, own, strict=True):
            keys, values = decode(page, g)
            if not config.key.coded:
                keys = jnp.where(jnp.isfinite(keys), keys, 0)
            if not config.value.coded:
                values = jnp.where(jnp.isfinite(values), values, 0)
            if cache.phases is not None:
                index = cache.layout.index(i * size + jnp.arange(size))
                keys = keys + _rotated_means(cache, rows, index, g)
                keys = keys.astype(values.dtype)
            if masked:
                keys, values = (jnp.where(seen, x, 0) for x in (keys, values))
            parts.append(segment(q, keys, values, held if masked else None))
        return parts

    def loop(first, last, masked: bool, parts: list[SegmentPart]) -> list[SegmentPart]:
        def step(i, parts: list[SegmentPart]) -> list[SegmentPart]:
            return [merge([*pair]) for pair in zip(parts, attend_to(i, masked), strict=True)]

        return lax.fori_loop(first, last, step, parts)

    full = jnp.min(tokens) // (pages * config.block)  # tiles that every sequence fills
    # first the one behind them: something to merge with, instead of zeros
    parts = [(output.astype(jnp.float32), lse) for output, lse in attend_to(full, masked=True)]
    parts = loop(0, full, False, parts)
    if batch > 1:  # sequences that are longer than the shortest
        parts = loop(full + 1, -(-jnp.max(tokens) // (pages * config.block)), True, parts)
    output, lse = (jnp.concatenate(x, axis=2) for x in zip(*parts, strict=True))
    lse = jnp.where(jnp.isneginf(lse), lse, lse + scale * _mean_products(cache, rows, queries))
    unrotate = partial(tensor_cores.unrotate, dtype=config.dtype)
    return head_rotation.rotate_by_member(unrotate, rows, values_of, output, kv_heads), lse


def _groups(kv_heads: int, query_rows: int, rows: int) -> int:
    """How many groups of kv heads a tile can be split into, each with `rows` rows of queries."""
    most = min(GROUPS, query_rows // rows)
    return next(n for n in range(max(1, most), 0, -1) if kv_heads % n == 0)


def _mean_products(cache: Cache, rows: LayerRows, queries):
    """<q, mean key>, which is missing in every compressed key; 0 if none is, or tiles have it."""
    if cache.key_mean is None or cache.phases is not None:
        return jnp.zeros(queries.shape[:-1], jnp.float32)
    mean = jnp.repeat(cache.key_mean[rows.layer], queries.shape[2] // cache.kv_heads, axis=1)
    # a sum, not a product of matrices, for which XLA would write the queries out in float32
    return jnp.sum(queries.astype(jnp.float32) * mean[:, None], axis=-1)


def _rotated_means(
    cache: Cache, rows: LayerRows, index: Int[Array, " S"], heads: Int[np.ndarray, " heads"]
) -> Float[Array, "B S heads H"]:
    """The mean keys of tokens `index`, counted behind the sinks, in the rotated space, float32."""
    assert cache.key_mean is not None
    means, own = cache.key_mean[rows.layer][:, heads], rows.only(heads)
    taken = jax.vmap(partial(pre_rope.mean_at, phases=cache.phases, index=index))(means)
    codecs = kernel_call.codecs_of(cache, own, 0)

    def turned(rotate, x):
        return head_rotation.rotate_by_member(rotate, own, codecs, x, len(heads))

    if cache.config.dtype != "bfloat16":
        return turned(head_rotation.rotate_queries, taken)
    # two digits of bfloat16, which tensor cores take; a conversion there and back XLA would skip
    upper = lax.reduce_precision(taken, 8, 7)
    digits = (turned(tensor_cores.rotate, x.astype(jnp.bfloat16)) for x in (upper, taken - upper))
    return next(digits) + next(digits)


def _decode_pages(
    cache: Cache, rows: LayerRows, page: Int[Array, "B pages"], heads: Int[np.ndarray, " heads"]
) -> tuple[Float[Array, "B S heads H"], Float[Array, "B S heads H"]]:
    """Keys and values [B, S, heads, H] of some pages and heads in the rotated space, in 16 bits."""
    own = rows.only(heads)

    def by_token(vectors):  # [heads, B, pages, T, H] -> [B, S, heads, H]
        vectors = jnp.moveaxis(vectors.astype(cache.config.dtype), 0, 3)
        return vectors.reshape(page.shape[0], -1, *vectors.shape[3:])

    found: tuple[list, list] = ([], [])
    for member in own.members:
        part, rows_of_member = cache.parts[member.part], member.of(len(heads))
        place = rows_of_member[:, None, None], page[None]
        held = jax.tree.map(lambda pool, place=place: pool[place], part.pool)
        sides = blocks.unpack(part.codecs, held)  # [heads, B, pages, ...]
        for vectors, codec, groups in zip(found, part.codecs, sides, strict=True):
            vectors.append(by_token(codec.dequantize(groups)))
    return own.join(found[0], axis=2), own.join(found[1], axis=2)
