"""Attention over a compressed cache, in `jnp`: the specification that every kernel equals.

Compressed blocks never leave the rotated space: <q, x~> = s <Pi q, c>, so the query is rotated once
and the output rotated back once (TurboQuant, arXiv:2504.19874; theory in the identities of its
section 3). The centre of the keys adds <q, R_p m> to every score of the compressed segment
(`cache.pre_rope`).
"""

import jax.numpy as jnp
from jax import tree
from jaxtyping import Array, Float, Int

from turboquant_jax.attention import head_rotation
from turboquant_jax.attention.projection import Heads, Projection
from turboquant_jax.attention.segments import (
    Scores,
    SegmentPart,
    attend_segment,
    merge,
    over_shares,
    sink_part,
)
from turboquant_jax.cache import blocks as block_layout
from turboquant_jax.cache.layout import sees
from turboquant_jax.cache.state import Cache, LayerRows, Rows


def attend(
    cache: Cache,
    rows: LayerRows,
    heads: Heads,
    scores: Scores,
    sink_logits: Float[Array, " N"] | None,
    shared: int = 0,
    empty: bool = False,
) -> Float[Array, "B T N H"]:
    """What `api.attend` says."""
    q, k, v = heads
    parts = [(_new if empty else _exact)(cache, rows, q, k, v, scores)]
    blocks = [] if empty or not cache.layout.slots else [_blocks]
    for over in blocks + ([_prefix] if shared else []):
        own = [
            over(
                cache,
                rows,
                member,
                head_rotation.pick_queries(member, q, cache.kv_heads),
                scores,
                shared,
            )
            for member in rows.members
        ]
        parts.append(head_rotation.join_heads(rows, own, cache.kv_heads))
    if cache.share is not None and not empty:
        parts = [over_shares(merge(parts), cache.share)]
    if sink_logits is not None:
        parts.append(sink_part(sink_logits, q.shape))
    return merge(parts)[0].astype(q.dtype)


def _exact(cache: Cache, rows: LayerRows, q, k, v, scores: Scores) -> SegmentPart:
    """Sinks, window and the new tokens themselves: everything in full precision."""
    dtype, layer = cache.config.dtype, rows.layer
    keys = [cache.sinks.keys[layer], cache.window.keys[layer], k.astype(dtype)]
    values = [cache.sinks.values[layer], cache.window.values[layer], v.astype(dtype)]
    lengths = cache.lengths[:, None]
    query = lengths + jnp.arange(q.shape[1])[None, :]
    position, held = cache.layout.exact_positions(lengths)
    position = jnp.concatenate([position, query], axis=1)
    held = jnp.concatenate([held, cache.layout.counted(query >= 0)], axis=1)
    visible = held[:, None, :] & sees(cache.config, query, position)
    return attend_segment(q, jnp.concatenate(keys, 1), jnp.concatenate(values, 1), visible, scores)


def _new(cache: Cache, rows: LayerRows, q, k, v, scores: Scores) -> SegmentPart:
    """The new tokens alone, of a cache that holds none."""
    keys, values = (x.astype(cache.config.dtype) for x in (k, v))
    token = jnp.arange(q.shape[1])[None, :]
    visible = jnp.broadcast_to(sees(cache.config, token, token), (q.shape[0], *2 * q.shape[1:2]))
    return attend_segment(q, keys, values, visible, scores)


def _blocks(
    cache: Cache, rows: LayerRows, member: Rows, q, scores: Scores, shared: int
) -> SegmentPart:
    """The compressed blocks of the heads that have one format, but for those that are shared."""
    position, held = cache.layout.block_positions(cache.lengths[:, None])
    query = cache.lengths[:, None] + jnp.arange(q.shape[1])[None, :]
    held = held & (position >= cache.layout.block_start(shared))
    visible = held[:, None, :] & sees(cache.config, query, position)
    bias = head_rotation.mean_products(cache, rows, member, q, position)
    table = jnp.maximum(cache.table.page_table, 0)
    return _over_pages(cache, member, q, table, visible, bias, scores)


def _prefix(
    cache: Cache, rows: LayerRows, member: Rows, q, scores: Scores, shared: int
) -> SegmentPart:
    """The shared blocks, which the queries of all sequences see as if they were those of one."""
    position = jnp.arange(shared * cache.config.block, dtype=jnp.int32)
    position = jnp.broadcast_to(position + cache.layout.block_start(0), (q.shape[0], len(position)))
    bias = head_rotation.mean_products(cache, rows, member, q, position)
    together = q.reshape(1, -1, *q.shape[2:])
    if bias is not None:
        bias = bias.reshape(*together.shape[:3], -1)
    visible = jnp.ones((1, together.shape[1], position.shape[1]), bool)
    table = cache.table.page_table[:1, :shared]
    output, lse = _over_pages(cache, member, together, table, visible, bias, scores)
    return output.reshape(q.shape), lse.reshape(q.shape[:3])


def _over_pages(
    cache: Cache, member: Rows, q, table: Int[Array, "B slots"], visible, bias, scores: Scores
) -> SegmentPart:
    """The tokens of these pages; `bias` is what centring took from their products."""
    part, own = cache.parts[member.part], member.of(cache.kv_heads)
    key_codec, value_codec = part.codecs
    heads, dim = own.shape[0], q.shape[3]
    place = own[:, None, None], table[None]
    pages = tree.map(lambda pool: pool[place], part.pool)  # [heads, B, slots, ...]
    keys, values = block_layout.unpack(part.codecs, pages)

    def by_token(vectors):  # [heads, B, slots, T, H] -> [B, S, heads, H]
        return jnp.moveaxis(vectors, 0, 3).reshape(table.shape[0], -1, heads, dim)

    output, lse = attend_segment(
        head_rotation.rotate_queries(key_codec, own, q),
        by_token(key_codec.dequantize(keys)),
        by_token(value_codec.dequantize(values)),
        visible,
        scores,
        bias,
    )
    return head_rotation.unrotate_outputs(value_codec, own, output), lse


def check_heads(cache: Cache, q, k, v) -> None:
    """ValueError unless queries, keys and values [B, T, heads, H] fit the heads of a cache."""
    heads, dim = cache.kv_heads, cache.config.head_dim
    expected = (*q.shape[:2], heads, dim)
    if k.shape != expected or v.shape != expected:
        raise ValueError(f"keys and values: got {k.shape} and {v.shape}, expected {expected}")
    if q.shape[3] != dim or q.shape[2] % heads:
        raise ValueError(
            f"queries: got {q.shape}, expected (B, T, N, {dim}) with N a multiple of {heads}"
        )


def check_window(cache: Cache, projection: Projection) -> None:
    """ValueError unless a cache keeps, and shows, what the model's queries see."""
    got, expected = cache.config.sliding_window, projection.sliding_window
    if got != expected:
        raise ValueError(f"sliding_window of the cache: got {got}, expected the model's {expected}")
