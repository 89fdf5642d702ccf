"""A cache as the GPU kernels take it: one step of decoding over all segments, and decoded pages.

Everything is passed as it lies in the cache, the rows of all layers as one; nothing is copied.
What depends on the lengths is computed inside the kernel: kernels beside it would take longer.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.decode import decode as decode_in_kernel
from pallas_kernels.decode_attention import (
    BlocksOperand,
    ExactOperand,
    ExactPlaces,
    PagedBlocks,
    RotationOperand,
    Sketch,
    Softmax,
    decode_attention,
)
from pallas_kernels.primitives.limits import MAX_HEADS
from pallas_kernels.rope import rope_and_rotate
from pallas_kernels.rope import rotate as rotate_in_kernel
from turboquant_jax.attention.head_rotation import rotate_by_member, rotate_queries
from turboquant_jax.attention.projection import Heads, Projection
from turboquant_jax.attention.segments import (
    Scores,
    attend_segment,
    merge,
    over_shares,
    sink_part,
)
from turboquant_jax.cache import kernel_operands
from turboquant_jax.cache.codec import Codec
from turboquant_jax.cache.kernel_operands import flat
from turboquant_jax.cache.layout import Layout, Share, locate
from turboquant_jax.cache.state import Cache, Exact, LayerRows, Part
from turboquant_jax.quantizers.rotation import Identity


def attend(
    cache: Cache,
    rows: LayerRows,
    heads: Heads,
    scores: Scores,
    sink_logits: Float[Array, " N"] | None,
    *,
    write: bool,
    rotated: Float[Array, "B N H"] | None = None,
) -> tuple[Float[Array, "B 1 N H"], Cache]:
    """Attention of one query per sequence over a layer and over the new token's key and value.

    The output has the dtype of the query. `write` also writes the token where it is pending.
    `rotated`: the query in the rotated space of the keys, where that has been made already.
    """
    dtype = cache.config.dtype
    query, new = heads[0][:, 0], Exact(heads[1].astype(dtype), heads[2].astype(dtype))
    if rotated is None:
        rotated = _rotate(cache, rows, query)
    whole = cache.share is None
    output, lse, exact = decode_attention(
        rotated,
        _paged(cache, rows),
        Softmax(
            scores.factor(cache.config.head_dim), scores.softcap, sink_logits if whole else None
        ),
        exact=_exact_operand(cache, rows.layer, query, new, write, exact_places),
        sketch=_sketch(cache.parts[rows.members[0].part], rotated),
        rotation=_rotation_of_values(cache, rows),
        dtype=query.dtype if whole else jnp.float32,
    )
    output, lse = output[:, None], lse[:, None]
    if not whole:
        output, lse = over_shares((output, lse), cache.share)
        # the new token is seen: if nothing has a weight, all scores overflowed
        parts = [(jnp.where(jnp.isneginf(lse)[..., None], jnp.nan, output), lse)]
        parts += [] if sink_logits is None else [sink_part(sink_logits, output.shape)]
        output = merge(parts)[0].astype(query.dtype)
    return output, cache if exact is None or not write else _written(cache, exact)


def attend_several(
    cache: Cache,
    rows: LayerRows,
    heads: Heads,
    scores: Scores,
    sink_logits: Float[Array, " N"] | None,
) -> Float[Array, "B T N H"]:
    """Attention of a few queries per sequence over a layer, and causally over their own tokens.

    To the kernel, which reads the cache once for them, they are query heads: what they see of it is
    the same. Their own tokens are a segment beside it.
    """
    q, k, v = heads
    batch, count, total, dim = q.shape
    group = total // cache.kv_heads
    most = max(1, MAX_HEADS // group)
    calls = -(-count // most)
    most = -(-count // calls)
    parts = []
    for start in range(0, count, most):
        some = q[:, start : start + most].reshape(batch, -1, cache.kv_heads, group, dim)
        by_head = jnp.moveaxis(some, 1, 2)  # [B, K, T, G, H]
        flat_heads = by_head.reshape(batch, -1, dim)
        output, lse = _over_cache(cache, rows, flat_heads, scores)

        def by_token(x, shape=by_head.shape):
            x = jnp.moveaxis(x.reshape(*shape[:4], *x.shape[2:]), 2, 1)
            return x.reshape(batch, shape[2], total, *x.shape[4:])

        parts.append((by_token(output), by_token(lse)))
    outputs, lses = zip(*parts, strict=True)
    past = jnp.concatenate(outputs, axis=1), jnp.concatenate(lses, axis=1)
    past = over_shares(past, cache.share)
    dtype, token = cache.config.dtype, jnp.arange(count)
    causal = jnp.broadcast_to(token[:, None] >= token[None, :], (batch, count, count))
    own = attend_segment(q, k.astype(dtype), v.astype(dtype), causal, scores)
    sinks = [] if sink_logits is None else [sink_part(sink_logits, q.shape)]
    return merge([past, own, *sinks])[0].astype(q.dtype)


def _over_cache(
    cache: Cache, rows: LayerRows, query: Float[Array, "B N H"], scores: Scores
) -> tuple[Float[Array, "B N H"], Float[Array, "B N"]]:
    """Queries that see all of the cache and nothing else: float32 output and log-sum-exp."""
    batch, _, dim = query.shape
    nothing = jnp.zeros((batch, 1, cache.kv_heads, dim), cache.config.dtype)
    rotated = _rotate(cache, rows, query)
    exact = _exact_operand(cache, rows.layer, query, Exact(nothing, nothing), False, held_places)
    output, lse, _ = decode_attention(
        rotated,
        _paged(cache, rows),
        Softmax(scores.factor(cache.config.head_dim), scores.softcap),
        exact=exact,
        sketch=_sketch(cache.parts[rows.members[0].part], rotated),
        rotation=_rotation_of_values(cache, rows),
    )
    return output, lse


def turns(projection: Projection) -> bool:
    """Whether the kernel does RoPE and rotation of a projection: of whole heads, in bfloat16.

    The products are exact then.
    """
    whole = 2 * projection.cos.shape[-1] == projection.qkv.shape[-1]
    return whole and projection.qkv.dtype == jnp.bfloat16


def attend_projection(
    cache: Cache,
    rows: LayerRows,
    projection: Projection,
    sink_logits: Float[Array, " N"] | None,
) -> tuple[Float[Array, "B 1 N H"], Cache]:
    """`attend` of a projection of one token per sequence, in bfloat16; the token is written."""
    operand = kernel_operands.of_layer(rows, codecs_of(cache, rows, 0), cache.kv_heads)
    qkv, cos, sin = (x[:, 0] for x in (projection.qkv, projection.cos, projection.sin))
    q, k, v, rotated = rope_and_rotate(qkv, cos, sin, operand)
    heads = q[:, None], k[:, None], v[:, None]
    scores = projection.scores
    return attend(cache, rows, heads, scores, sink_logits, write=True, rotated=rotated)


def decode_pages(
    cache: Cache, rows: LayerRows, pages: Int[Array, "B pages"], heads: Int[Array, " heads"]
) -> tuple[Float[Array, "B S heads H"], Float[Array, "B S heads H"]]:
    """Keys and values of some pages and heads of a layer in the rotated space, in its dtype."""
    if len(rows.members) == 1:
        own = [rows.members[0].first + heads]
    else:
        own = [x[heads] for x in rows.places(cache.kv_heads).T[::-1]]
    found = decode_in_kernel(
        tuple(blocks_of(cache.parts[member.part]) for member in rows.members),
        pages.ravel(),
        *own,
        dtype=cache.config.dtype,
    )
    shape = (pages.shape[0], -1, *found[0].shape[2:])
    return found[0].reshape(shape), found[1].reshape(shape)


def _paged(cache: Cache, rows: LayerRows) -> PagedBlocks:
    """The blocks of a layer: rows of one part, or of some parts, each head with its own."""
    pools = tuple(blocks_of(cache.parts[member.part]) for member in rows.members)
    table, lengths, kv_heads = cache.table.page_table, cache.lengths, cache.kv_heads
    if len(pools) == 1:
        return PagedBlocks(pools, table, lengths, rows.members[0].first, kv_heads)
    return PagedBlocks(pools, table, lengths, heads=rows.places(kv_heads))


def codecs_of(cache: Cache, rows: LayerRows, side: int) -> list[Codec]:
    """Those of the keys (0), or of the values (1), of each member of a layer."""
    return [cache.parts[member.part].codecs[side] for member in rows.members]


def _rotation_of_values(cache: Cache, rows: LayerRows) -> RotationOperand | None:
    """None where the outputs of all heads are where they belong."""
    codecs = codecs_of(cache, rows, 1)
    groups = [group for codec in codecs for group in codec.groups]
    moved = any(codec.order is not None or codec.transform is not None for codec in codecs)
    if not moved and all(isinstance(group.rotation, Identity) for group in groups):
        return None
    return kernel_operands.of_layer(rows, codecs, cache.kv_heads)


def _rotate(cache: Cache, rows: LayerRows, query: Float[Array, "B N H"]) -> Float[Array, "B N H"]:
    """One query per sequence in the rotated space of the keys, float32."""
    codecs = codecs_of(cache, rows, 0)
    if not cache.config.key.coded:
        return query.astype(jnp.float32)
    if query.dtype != jnp.bfloat16:
        return rotate_by_member(rotate_queries, rows, codecs, query[:, None], cache.kv_heads)[:, 0]
    return rotate_in_kernel(query, kernel_operands.of_layer(rows, codecs, cache.kv_heads))


def _sketch(part: Part, rotated: Float[Array, "B N H"]) -> Sketch | None:
    """What a sketch of the keys adds to their scores, for these queries in the rotated space."""
    if (held := part.pool.sketches) is None:
        return None
    return Sketch(part.codecs[0].sketch_query(rotated), held.signs, held.norms)


def _exact_operand(
    cache: Cache, layer: Int[Array, ""], query, new: Exact, write: bool, places: Any
) -> ExactOperand:
    held = [part for part in (cache.sinks, cache.window) if part.keys.shape[2]]
    phases, layout, pending = cache.phases, cache.layout, cache.table.pending
    if (share := cache.share) is not None:  # in one number, as the kernel takes no other
        places, pending = (
            partial(on_share, places, share.count),
            share.index + pending * share.count,
        )
        layout = replace(layout, share=None)
    return ExactOperand(
        query=query,
        keys=(*(flat(part.keys) for part in held), new.keys),
        values=(*(flat(part.values) for part in held), new.values),
        pending=pending,
        places=partial(places, layout),
        key_mean=None if cache.key_mean is None else flat(cache.key_mean),
        phases=None if phases is None else kernel_operands.of_phases(phases, cache.share),
        write=write,
        layer=layer,
    )


def exact_places(layout: Layout, length: Any, pending: Any) -> ExactPlaces:
    """Where the tokens of a sequence lie, as the kernel asks it: of the segments that there are."""
    place = locate(layout, length, pending)
    segments: list[tuple[Any, Any, Any]] = []
    if layout.sinks:
        segments.append((*place.sinks, place.sink_slot))
    if layout.ring:
        segments.append((*place.window, place.window_slot))
    return ExactPlaces(place.blocks, (*segments, (0, layout.counted(1), 0)))


def held_places(layout: Layout, length: Any, pending: Any) -> ExactPlaces:
    """`exact_places` without the newest token."""
    places = exact_places(layout, length, pending)
    return places._replace(segments=(*places.segments[:-1], (0, 0, 0)))


def on_share(places: Any, shares: int, layout: Layout, length: Any, pending: Any) -> ExactPlaces:
    """`places` on a share, whose number is in that of the pending tokens."""
    here = replace(layout, share=Share(pending % shares, shares))
    return places(here, length, pending // shares)


def _written(cache: Cache, exact: ExactOperand) -> Cache:
    """The cache with the segments of `exact`, which hold the new token."""
    stored = zip(exact.keys[:-1], exact.values[:-1], strict=True)
    parts: dict[str, Any] = {}
    for name in ("sinks", "window"):
        old = getattr(cache, name)
        if old.keys.shape[2]:
            keys, values = next(stored)
            parts[name] = Exact(keys.reshape(old.keys.shape), values.reshape(old.values.shape))
    return replace(cache, **parts)


def blocks_of(part: Part) -> BlocksOperand:
    """Blocks of all rows, as the kernels read them; no codebooks of a side in full precision."""
    pool, sides = part.pool, []
    for codec in part.codecs:
        books = [kernel_operands.codebook_of(group) for group in codec.groups]
        served = tuple(book for book in books if book is not None)
        if len(served) < len(books):
            raise NotImplementedError("the kernel serves codebooks on its grid: codebook='grid'")
        sides.append(served)
    key, value = (codec.transform is not None for codec in part.codecs)
    joint = key, value
    return BlocksOperand(pool.keys, pool.values, pool.scales, sides[0], sides[1], joint, pool.bases)
