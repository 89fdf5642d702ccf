"""Attention of a chunk over itself and over the compressed past, by the vendor's kernel.

Three segments, joined by their log-sum-exp: the chunk, causally; sinks and window; and the
compressed blocks, a tile at a time, which is decoded to 16 bits in the rotated space, read once and
forgotten. So the past is never there in full precision, however long it is.

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
from jax import lax
from jaxtyping import Array, Float, Int

from turboquant_jax.attention import head_rotation, triton
from turboquant_jax.attention.segments import Scores, SegmentPart, merge, sink_part
from turboquant_jax.cache import blocks, kernel_operands
from turboquant_jax.cache.codec import Codec
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
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    scores: Scores,
    sink_logits: Float[Array, " N"] | None,
    *,
    decode_by: Implementation,
) -> Float[Array, "B T N H"]:
    """What `api.attend` says, with operands in the cache's 16 bits; no cap, no window."""
    config = cache.config
    scale = scores.factor(config.head_dim)
    queries, keys, values = (x.astype(config.dtype) for x in (q, k, v))
    reach = _reach(queries)
    queries = jnp.where(jnp.isfinite(reach)[..., None], queries, 0)
    keys, values, key_reach, bad = _clean(keys, values)
    sinks = [] if sink_logits is None else [sink_part(sink_logits, q.shape)]
    segment = partial(_segment, scale)

    def merged(parts: list[SegmentPart], past_reach, past_bad):
        """The output, NaN where the past or the chunk up to the query's token spoils it."""
        group = q.shape[2] // cache.kv_heads
        both = jnp.maximum(lax.cummax(key_reach, axis=1), past_reach[:, None])
        finite = jnp.isfinite(reach * (config.head_dim * jnp.repeat(both, group, axis=2)))
        token = jnp.arange(q.shape[1])[None, :, None, None]
        first = jnp.min(jnp.where(bad, token, q.shape[1]), axis=1)
        first = jnp.where(past_bad, 0, first)
        finite = finite[..., None] & jnp.repeat(token < first[:, None], group, axis=2)
        return jnp.where(finite, merge(parts + sinks)[0], jnp.nan).astype(q.dtype)

    def alone():
        parts = [segment(queries, keys, values, is_causal=True)]
        return parts, jnp.zeros_like(key_reach[:, 0]), jnp.zeros_like(bad[:, 0])

    def with_past():
        parts, *_ = alone()
        held, past_reach, past_bad = _exact(cache, rows)
        parts.append(segment(queries, *held))
        if cache.layout.slots:
            parts.append(_over_blocks(cache, rows, queries, segment, scale, decode_by))
            past_reach = jnp.maximum(past_reach, _reach_of_blocks(cache, rows))
        return parts, past_reach, past_bad

    # each branch goes all the way to the output: what leaves a branch is copied
    return lax.cond(
        jnp.any(cache.lengths > 0), lambda: merged(*with_past()), lambda: merged(*alone())
    )


def _reach(x: Float[Array, "*batch H"]) -> Float[Array, "*batch"]:
    """The largest magnitude of each vector, infinity if it holds NaN or infinity; float32."""
    largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1)
    return jnp.where(jnp.isfinite(largest), largest, jnp.inf)


def _clean(keys: Float[Array, "B S K H"], values: Float[Array, "B S K H"]):
    """Both, finite; the reach of the keys [B, S, K], and where values were not finite."""
    reach, bad = _reach(keys), ~jnp.isfinite(values)
    keys = jnp.where(jnp.isfinite(reach)[..., None], keys, 0)
    return keys, jnp.where(bad, 0, values), reach, bad


def _segment(scale: float, q, k, v, count=None, *, is_causal=False) -> SegmentPart:
    """All tokens, or of each sequence the first `count`, which may be none."""
    mask = None if count is None else jnp.maximum(count, 1)
    output, lse = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=is_causal,
        key_value_seq_lengths=mask,
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
    keys, values, reach, bad = _clean(keys, values)
    seen = (jnp.arange(keys.shape[1])[None, :] < count[:, None])[..., None]
    reach = jnp.max(jnp.where(seen, reach, 0.0), axis=1, initial=0.0)
    return (keys, values, count), reach, jnp.any(bad & seen[..., None], axis=1)


def _over_blocks(
    cache: Cache, rows: LayerRows, queries, segment, scale: float, decode_by: Implementation
) -> SegmentPart:
    """The compressed blocks, tile by tile in the rotated space."""
    config, slots, kv_heads = cache.config, cache.layout.slots, cache.kv_heads
    batch, count, heads, dim = queries.shape
    (member,) = rows.members
    key_codec, value_codec = cache.parts[member.part].codecs
    groups = _groups(kv_heads, batch * count * heads, ROWS)
    own = jnp.arange(kv_heads, dtype=jnp.int32).reshape(groups, -1)
    rotated = _rotate(key_codec, member.of(kv_heads), queries)
    rotated = rotated.astype(queries.dtype).reshape(batch, count, groups, -1, dim)
    by_group = [rotated[:, :, g] for g in range(groups)]  # once, not in every turn of the loops
    tokens = config.compressed_tokens(cache.lengths)
    pages = min(slots, max(1, TILE // config.block))
    table = jnp.pad(jnp.maximum(cache.table.page_table, 0), ((0, 0), (0, pages)))
    decode = triton.decode_pages if decode_by == "pallas" else _decode_pages

    def attend_to(i, masked: bool) -> list[SegmentPart]:
        """Tile i, group by group."""
        page = lax.dynamic_slice_in_dim(table, i * pages, pages, axis=1)
        size = pages * config.block
        held = jnp.clip(tokens - i * size, 0, size)
        seen = (jnp.arange(size)[None, :] < held[:, None])[..., None, None]
        parts = []
        for q, g in zip(by_group, own, strict=True):
            keys, values = decode(cache, rows, page, g)
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
    return _unrotate(value_codec, member.of(kv_heads), output, config.dtype), lse


def _reach_of_blocks(cache: Cache, rows: LayerRows) -> Float[Array, "B K"]:
    """Of the compressed keys that are seen in the rotated space; infinity if a value is not finite.

    What a query's largest magnitude may be multiplied by on its way there is counted in here.
    """
    (member,) = rows.members
    part, own = cache.parts[member.part], member.of(cache.kv_heads)
    tokens, table = cache.config.compressed_tokens(cache.lengths), cache.table.page_table
    place = own[:, None, None], jnp.maximum(table, 0)[None]
    scales = blocks.largest_key_scale(tuple(x[place] for x in part.pool.scales))
    scales = scales.reshape(*scales.shape[:2], -1)  # [K, B, tokens]
    seen = jnp.arange(scales.shape[2])[None, :] < tokens[:, None]
    largest = jnp.max(jnp.where(seen[None], scales, 0.0), axis=2).T
    level = max(abs(level) for group in part.codecs[0].groups for level in group.levels)
    reach = largest * level * part.codecs[0].query_gain(own)[None]
    if cache.key_mean is None:
        return reach
    mean = _reach(cache.key_mean[rows.layer])
    return jnp.where((tokens > 0)[:, None], jnp.maximum(reach, mean), 0.0)


def _groups(kv_heads: int, query_rows: int, rows: int) -> int:
    """How many groups of kv heads a tile can be split into, each with `rows` rows of queries."""
    most = min(GROUPS, query_rows // rows)
    return next(n for n in range(max(1, most), 0, -1) if kv_heads % n == 0)


def _mean_products(cache: Cache, rows: LayerRows, queries):
    """<q, mean key>, which centring took from every compressed key; 0 without centring."""
    if cache.key_mean is None:
        return jnp.zeros(queries.shape[:-1], jnp.float32)
    mean = jnp.repeat(cache.key_mean[rows.layer], queries.shape[2] // cache.kv_heads, axis=1)
    # a sum, not a product of matrices, for which XLA would write the queries out in float32
    return jnp.sum(queries.astype(jnp.float32) * mean[:, None], axis=-1)


def _rotate(
    codec: Codec, rows: Int[Array, " K"], query: Float[Array, "B T N H"]
) -> Float[Array, "B T N H"]:
    """Queries in the rotated space of the keys, float32; on the tensor cores from bfloat16."""
    if query.dtype != jnp.bfloat16:
        return head_rotation.rotate_queries(codec, rows, query)
    rotation = kernel_operands.of_codec(codec, rows)
    if rotation.signs is not None:
        query = query * rotation.signs.astype(query.dtype)[None, None, None, :]
    return rotation.gain * _products("btkgi,kji->btkgj", query, rotation.parts)


def _unrotate(
    codec: Codec, rows: Int[Array, " K"], output: Float[Array, "B T N H"], dtype: str
) -> Float[Array, "B T N H"]:
    """Outputs back from the rotated space, float32; on the tensor cores to bfloat16."""
    if dtype != "bfloat16":
        return head_rotation.unrotate_outputs(codec, rows, output)
    rotation = kernel_operands.of_codec(codec, rows)
    rotated = _products("kji,btkgj->btkgi", output.astype(jnp.bfloat16), rotation.parts)
    rotated = rotated * rotation.gain
    return rotated if rotation.signs is None else rotated * rotation.signs[None, None, None, :]


def _products(
    equation: str, x: Float[Array, "B T N H"], parts: Float[Array, "parts heads H H"]
) -> Float[Array, "B T N H"]:
    """Each head by its matrix, whose parts add up, in float32."""
    grouped = x.reshape(*x.shape[:2], parts.shape[1], -1, x.shape[3])
    total = jnp.zeros(grouped.shape, jnp.float32)
    for part in parts:
        pair = (grouped, part) if equation.startswith("btkg") else (part, grouped)
        total = total + jnp.einsum(equation, *pair, preferred_element_type=jnp.float32)
    return total.reshape(x.shape)


def _decode_pages(
    cache: Cache, rows: LayerRows, page: Int[Array, "B pages"], heads: Int[Array, " heads"]
) -> tuple[Float[Array, "B S heads H"], Float[Array, "B S heads H"]]:
    """Keys and values [B, S, heads, H] of some pages and heads in the rotated space, in 16 bits."""
    (member,) = rows.members
    part, place = cache.parts[member.part], (member.first + heads[:, None, None], page[None])
    found = jax.tree.map(lambda pool: pool[place], part.pool)  # [heads, B, pages, ...]
    keys, values = blocks.unpack(part.codecs, found)

    def by_token(vectors):  # [heads, B, pages, T, H] -> [B, S, heads, H]
        vectors = jnp.moveaxis(vectors.astype(cache.config.dtype), 0, 3)
        return vectors.reshape(page.shape[0], -1, *vectors.shape[3:])

    key_codec, value_codec = part.codecs
    return by_token(key_codec.dequantize(keys)), by_token(value_codec.dequantize(values))
