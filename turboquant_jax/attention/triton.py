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
from pallas_kernels.primitives.limits import MAX_HEADS, MAX_TURNED_HEADS
from pallas_kernels.rope import rope_and_rotate
from pallas_kernels.rope import rotate as rotate_in_kernel
from turboquant_jax.attention.head_rotation import rotate_by_member, rotate_queries
from turboquant_jax.attention.projection import Heads, Projection
from turboquant_jax.attention.segments import Scores
from turboquant_jax.cache import kernel_operands
from turboquant_jax.cache.codec import Codec
from turboquant_jax.cache.kernel_operands import flat
from turboquant_jax.cache.layout import Layout, locate
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
    rotated: Float[Array, "B 1 N H"] | None = None,
) -> tuple[Float[Array, "B 1 N H"], Cache]:
    """Attention of one query per sequence over a layer and over the new token's key and value.

    The output has the dtype of the query. `write` also writes the token where it is pending.
    `rotated`: the query in the rotated space of the keys, where that has been made already.
    """
    dtype = cache.config.dtype
    query, new = heads[0][:, 0], Exact(heads[1].astype(dtype), heads[2].astype(dtype))
    turned = None if rotated is None else rotated[:, 0]
    output, exact = _attend(
        cache, rows, query, new, scores, sink_logits, rotated=turned, write=write
    )
    return output[:, None], cache if exact is None or not write else _written(cache, exact)


def _attend(
    cache: Cache,
    rows: LayerRows,
    query: Float[Array, "B N H"],
    new: Exact,
    scores: Scores,
    sink_logits: Float[Array, " N"] | None,
    *,
    rotated: Float[Array, "B N H"] | None = None,
    **newest: Any,
) -> tuple[Float[Array, "B N H"], ExactOperand | None]:
    """The kernel over all segments and the newest tokens; `newest` as `ExactOperand` has it."""
    if rotated is None:
        rotated = _rotate(cache, rows, query)
    output, _, exact = decode_attention(
        rotated,
        _paged(cache, rows),
        Softmax(scores.factor(cache.config.head_dim), scores.softcap, sink_logits),
        exact=_exact_operand(cache, rows.layer, query, new, **newest),
        sketch=_sketch(cache.parts[rows.members[0].part], rotated),
        rotation=_rotation_of_values(cache, rows),
        dtype=query.dtype,
    )
    return output, exact


def attend_several(
    cache: Cache,
    rows: LayerRows,
    heads: Heads,
    scores: Scores,
    sink_logits: Float[Array, " N"] | None,
    rotated: Float[Array, "B T N H"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of a few queries per sequence over a layer, and causally over their own tokens.

    To the kernel, which reads the cache once for as many as it has columns, they are query heads.
    """
    q, k, v = heads
    dtype = cache.config.dtype
    new = Exact(k.astype(dtype), v.astype(dtype))
    batch, count, total, dim = q.shape
    group = total // cache.kv_heads
    columns = MAX_HEADS if cache.phases is None else MAX_TURNED_HEADS
    calls = -(-count // max(1, columns // group))
    most, outputs = -(-count // calls), []
    for start in range(0, count, most):
        tokens = min(most, count - start)

        def by_head(x, start=start, tokens=tokens):  # of a kv head its tokens' queries in turn
            some = x[:, start : start + tokens].reshape(batch, tokens, cache.kv_heads, group, dim)
            return jnp.moveaxis(some, 1, 2).reshape(batch, -1, dim)

        logits = None
        if sink_logits is not None:
            of_group = sink_logits.reshape(cache.kv_heads, 1, group)
            logits = jnp.broadcast_to(of_group, (cache.kv_heads, tokens, group)).ravel()
        output, _ = _attend(
            cache, rows, by_head(q), new, scores, logits,
            rotated=None if rotated is None else by_head(rotated),
            queries=tokens, later=count - start - tokens,
        )  # fmt: skip
        output = output.reshape(batch, cache.kv_heads, tokens, group, dim)
        outputs.append(jnp.moveaxis(output, 2, 1))
    return jnp.concatenate(outputs, axis=1).reshape(q.shape)


def turns(projection: Projection) -> bool:
    """Whether the kernel does RoPE and rotation of a projection: of whole heads, in bfloat16.

    The products are exact then.
    """
    whole = 2 * projection.cos.shape[-1] == projection.qkv.shape[-1]
    return whole and projection.qkv.dtype == jnp.bfloat16


def turn(
    cache: Cache, rows: LayerRows, projection: Projection
) -> tuple[Heads, Float[Array, "B T N H"]]:
    """Heads of a projection in bfloat16, and the queries in the rotated space of the keys."""
    operand = kernel_operands.of_layer(rows, codecs_of(cache, rows, 0), cache.kv_heads)
    shape = projection.qkv.shape[:2]
    tokens = (projection.qkv, projection.cos, projection.sin)
    qkv, cos, sin = (x.reshape(-1, *x.shape[2:]) for x in tokens)
    turned = rope_and_rotate(qkv, cos, sin, operand)
    q, k, v, rotated = (x.reshape(*shape, *x.shape[1:]) for x in turned)
    return (q, k, v), rotated


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
    cache: Cache, layer: Int[Array, ""], query, new: Exact, **newest: Any
) -> ExactOperand:
    held = [part for part in (cache.sinks, cache.window) if part.keys.shape[2]]
    return ExactOperand(
        query=query,
        keys=(*(flat(part.keys) for part in held), new.keys),
        values=(*(flat(part.values) for part in held), new.values),
        pending=cache.table.pending,
        places=partial(exact_places, cache.layout, newest=new.keys.shape[1]),
        key_mean=None if cache.key_mean is None else flat(cache.key_mean),
        phases=None if cache.phases is None else kernel_operands.of_phases(cache.phases),
        layer=layer,
        **newest,
    )


def exact_places(layout: Layout, length: Any, pending: Any, newest: int = 1) -> ExactPlaces:
    """Where the tokens of a sequence lie, as the kernel asks it: of the segments that there are."""
    place = locate(layout, length, pending)
    segments: list[tuple[Any, Any, Any]] = []
    if layout.sinks:
        segments.append((*place.sinks, place.sink_slot))
    if layout.ring:
        segments.append((*place.window, place.window_slot))
    return ExactPlaces(place.blocks, (*segments, (0, newest, 0)))


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
