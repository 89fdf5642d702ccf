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
from pallas_kernels.decode_attention import ExactOperand, ExactPlaces, Softmax, decode_attention
from pallas_kernels.decode_attention.plan import schedule_of
from pallas_kernels.rope import rope_and_rotate
from turboquant_jax.attention.kernel_call import (
    blocks_of,
    codecs_of,
    exact_operand,
    paged_blocks,
    rotate_query,
    rotation_of_values,
    sketch_of,
    written,
)
from turboquant_jax.attention.projection import Heads, Projection
from turboquant_jax.attention.segments import Scores, SegmentPart, merge, over_shares, sink_part
from turboquant_jax.attention.together import Together
from turboquant_jax.cache import kernel_operands
from turboquant_jax.cache.state import Cache, Exact, LayerRows


def attend(
    cache: Cache,
    rows: LayerRows,
    heads: Heads,
    scores: Scores,
    sink_logits: Float[Array, " N"] | None,
    *,
    write: bool,
    rotated: Float[Array, "B 1 N H"] | None = None,
    shared: int = 0,
) -> tuple[Float[Array, "B 1 N H"], Cache]:
    """Attention of one query per sequence over a layer and over the new token's key and value.

    The output has the dtype of the query. `write` also writes the token where it is pending.
    `rotated`: the query in the rotated space of the keys, where that has been made already.
    """
    dtype, query = cache.config.dtype, heads[0]
    new = Exact(heads[1].astype(dtype), heads[2].astype(dtype))
    if shared and rotated is None:  # once
        rotated = rotate_query(cache, rows, query[:, 0])[:, None]
    turned = None if rotated is None else rotated[:, 0]
    output, lse, exact = _attend(
        cache, rows, query[:, 0], new, scores, sink_logits, turned, shared, write=write
    )
    output = output[:, None]
    if shared:
        prefix = attend_prefix(cache, rows, query, rotated, scores, shared)
        output, _ = merge([prefix, (output, lse[:, None])])
    output = _joined(cache, (output, lse[:, None]), sink_logits).astype(query.dtype)
    return output, cache if exact is None or not write else written(cache, exact)


def _attend(
    cache: Cache,
    rows: LayerRows,
    query: Float[Array, "B N H"],
    new: Exact,
    scores: Scores,
    sink_logits: Float[Array, " N"] | None,
    rotated: Float[Array, "B N H"] | None,
    shared: int,
    **newest: Any,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N"], ExactOperand | None]:
    """The kernel over all segments and the newest tokens; `newest` as `ExactOperand` has it.

    Without the first `shared` blocks, if there are any, and in float32 then; on a share in float32
    too, and without the sinks.
    """
    whole = cache.share is None
    if rotated is None:
        rotated = rotate_query(cache, rows, query)
    exact = exact_operand(cache, rows.layer, query, new, shared, **newest)
    paged, schedule = paged_blocks(cache, rows), None
    if shared:
        own = replace(paged, page_table=paged.page_table[:, shared:])
        schedule = schedule_of(own, exact, cache.kv_heads, query.shape[1] // cache.kv_heads)
    return decode_attention(
        rotated,
        paged,
        Softmax(
            scores.factor(cache.config.head_dim), scores.softcap, sink_logits if whole else None
        ),
        exact=exact,
        sketch=sketch_of(cache.parts[rows.members[0].part], rotated),
        rotation=rotation_of_values(cache, rows),
        dtype=query.dtype if whole and not shared else jnp.float32,
        schedule=schedule,
    )


def _joined(
    cache: Cache, part: SegmentPart, sink_logits: Float[Array, " N"] | None
) -> Float[Array, "B T N H"]:
    """The output of all shares, with the sinks; of a whole cache as it is."""
    if cache.share is None:
        return part[0]
    output, lse = over_shares(part, cache.share)
    # the new token is seen: if nothing has a weight, all scores overflowed
    parts = [(jnp.where(jnp.isneginf(lse)[..., None], jnp.nan, output), lse)]
    parts += [] if sink_logits is None else [sink_part(sink_logits, output.shape)]
    return merge(parts)[0]


def attend_prefix(
    cache: Cache,
    rows: LayerRows,
    q: Float[Array, "B T N H"],
    rotated: Float[Array, "B T N H"] | None,
    scores: Scores,
    blocks: int,
) -> SegmentPart:
    """Attention of all queries over the first blocks, which all sequences share.

    To the kernel, which reads them once for as many as it has columns, they are heads of one.
    """
    mean, layer = cache.key_mean, rows.layer
    exact, end = None, blocks * cache.config.block
    together = Together.of(cache, q.reshape(1, -1, *q.shape[2:]))
    paged = replace(
        paged_blocks(cache, rows),
        page_table=cache.table.page_table[:1, :blocks],
        lengths=jnp.full(1, end, jnp.int32),
    )
    found = []
    for tokens in together.calls():
        query = together.heads(q.reshape(1, -1, *q.shape[2:]), tokens)
        turned = (
            rotate_query(cache, rows, query)
            if rotated is None
            else together.heads(rotated.reshape(1, -1, *q.shape[2:]), tokens)
        )
        if mean is not None:
            nothing = jnp.zeros((1, 1, cache.kv_heads, q.shape[3]), cache.config.dtype)
            exact = ExactOperand(
                query=query,
                keys=(nothing,),
                values=(nothing,),
                pending=jnp.zeros(1, jnp.int32),
                places=partial(_only_blocks, end),
                key_mean=mean[layer, :1],
                phases=None if cache.phases is None else kernel_operands.of_phases(cache.phases),
            )
        output, lse, _ = decode_attention(
            turned,
            paged,
            Softmax(scores.factor(cache.config.head_dim), scores.softcap),
            exact=exact,
            sketch=sketch_of(cache.parts[rows.members[0].part], turned),
            rotation=rotation_of_values(cache, rows),
        )
        found.append((together.tokens(output, tokens), together.tokens(lse, tokens)))
    output, lse = (jnp.concatenate(x, axis=1) for x in zip(*found, strict=True))
    return output.reshape(q.shape), lse.reshape(q.shape[:3])


def _only_blocks(end: int, length: Any, pending: Any) -> ExactPlaces:
    """Blocks up to a token, and nothing in full precision."""
    del length, pending
    return ExactPlaces((0, jnp.int32(end)), ((0, 0, 0),))


def attend_several(
    cache: Cache,
    rows: LayerRows,
    heads: Heads,
    scores: Scores,
    sink_logits: Float[Array, " N"] | None,
    rotated: Float[Array, "B T N H"] | None = None,
    shared: int = 0,
) -> Float[Array, "B T N H"]:
    """Attention of a few queries per sequence over a layer, and causally over their own tokens.

    To the kernel, which reads the cache once for as many as it has columns, they are query heads.
    """
    q, k, v = heads
    dtype = cache.config.dtype
    new = Exact(k.astype(dtype), v.astype(dtype))
    together, outputs = Together.of(cache, q), []
    for tokens in together.calls():
        logits = None
        if sink_logits is not None:
            each = jnp.broadcast_to(
                sink_logits[None, None, :, None], (1, len(tokens), q.shape[2], 1)
            )
            logits = together.heads(each, range(len(tokens))).ravel()
        output, lse, _ = _attend(
            cache, rows, together.heads(q, tokens), new, scores, logits,
            None if rotated is None else together.heads(rotated, tokens), shared,
            queries=len(tokens), later=together.count - tokens.stop,
        )  # fmt: skip
        outputs.append((together.tokens(output, tokens), together.tokens(lse, tokens)))
    output, lse = (jnp.concatenate(x, axis=1) for x in zip(*outputs, strict=True))
    if shared:
        output, _ = merge([attend_prefix(cache, rows, q, rotated, scores, shared), (output, lse)])
    return _joined(cache, (output, lse), sink_logits).astype(q.dtype)


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
        places = rows.by_format()[rows.order][heads]
        own = [places[:, 1], places[:, 0]]
    found = decode_in_kernel(
        tuple(blocks_of(cache.parts[member.part]) for member in rows.members),
        pages.ravel(),
        *own,
        dtype=cache.config.dtype,
    )
    shape = (pages.shape[0], -1, *found[0].shape[2:])
    return found[0].reshape(shape), found[1].reshape(shape)
