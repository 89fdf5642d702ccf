"""Attention over a compressed cache.

A chunk of T new tokens sees the cache as it stands, and itself, causally and in full precision;
only then is it appended. Decoding is the case T = 1, prefill any other, and the rule is one.
"""

import dataclasses

import jax
from jaxtyping import Array, Float, Int

from turboquant_jax.attention import cudnn, definition, triton
from turboquant_jax.attention.projection import Projection
from turboquant_jax.attention.segments import PLAIN, Scores
from turboquant_jax.cache.choose import Attention, choose_attention
from turboquant_jax.cache.state import Cache, LayerRows, rows_of
from turboquant_jax.cache.updating import write_layer
from turboquant_jax.implementation import Implementation


def attend(
    cache: Cache,
    layer: Int[Array, ""] | int,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    scores: Scores = PLAIN,
    sink_logits: Float[Array, " N"] | None = None,
    implementation: Implementation | None = None,
    shared_blocks: int = 0,
) -> Float[Array, "B T N H"]:
    """Attention of T new tokens over the cache of a layer and over themselves.

    Args:
      cache: holds `lengths` tokens of each sequence; the new tokens are not in it yet.
      layer: which layer of the cache; traced only where all layers have one format.
      q: queries of the new tokens, after RoPE; N heads share K heads in groups of N / K. Rows of
        padding at the end of a chunk change nothing for the rows before them.
      k: their keys, after RoPE.
      v: their values.
      scores: scale and soft cap.
      sink_logits: one learned logit per query head that takes part in the softmax without a value
        (GPT-OSS).
      implementation: "xla" is the definition; "pallas" the GPU kernel, for T = 1 to 8; "cudnn" the
        vendor's attention over the chunk and over tiles of the past, for T > 1. None takes what
        the device and the call are served by.
      shared_blocks: the caller knows (`cache.shared_blocks`) that the first so many blocks of all
        sequences are those of the first one, as of forks of one prompt: they are read once.

    Returns:
      The output in the dtype of q.

    Raises:
      ValueError: shapes that do not fit the cache, an unknown implementation, or shared blocks that
        the cache cannot have.
      NotImplementedError: an implementation that this device or call is not served by.
    """
    rows = rows_of(cache, layer)
    _check(cache, q, k, v)
    chosen = choose_attention(cache, q.shape[1], scores.softcap, implementation, shared_blocks)
    return _attend(cache, rows, (q, k, v), scores, sink_logits, chosen)


def attend_and_write(
    cache: Cache,
    layer: Int[Array, ""] | int,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    scores: Scores = PLAIN,
    sink_logits: Float[Array, " N"] | None = None,
    implementation: Implementation | None = None,
    shared_blocks: int = 0,
) -> tuple[Float[Array, "B T N H"], Cache]:
    """`attend`, then `cache.write` of the pending tokens, in one kernel where it is served.

    Between `cache.begin` and `cache.commit`; arguments and errors are those of `attend`.
    """
    rows = rows_of(cache, layer)
    _check(cache, q, k, v)
    chosen = choose_attention(cache, q.shape[1], scores.softcap, implementation, shared_blocks)
    return _attend_and_write(cache, rows, (q, k, v), scores, sink_logits, chosen)


def attend_projection(
    cache: Cache,
    layer: LayerRows | Int[Array, ""] | int,
    projection: Projection,
    *,
    sink_logits: Float[Array, " N"] | None = None,
    implementation: Implementation | None = None,
    shared_blocks: int = 0,
    empty: bool = False,
) -> tuple[Float[Array, "B T N H"], Cache]:
    """`attend_and_write` of what a layer projected, RoPE in the kernel's way where it is served.

    The layer may be given by its rows, `rows_of(cache, layer)`: layers whose rows differ in arrays
    alone share one compiled call. `empty`: the caller knows that the cache holds no token, so that
    of a prompt only its own attention is compiled. Other arguments and errors are those of
    `attend`; ValueError also for a cache of another sliding window than the projection's.
    """
    rows = layer if isinstance(layer, LayerRows) else rows_of(cache, layer)
    _check(cache, *jax.eval_shape(Projection.heads, projection))
    definition.check_window(cache, projection)
    scores = projection.scores
    queries = projection.qkv.shape[1]
    chosen = choose_attention(cache, queries, scores.softcap, implementation, shared_blocks)
    chosen = dataclasses.replace(chosen, empty=empty)
    if chosen.attend == "pallas" and triton.turns(projection):
        heads, rotated = triton.turn(cache, rows, projection)
        return _attend_and_write(cache, rows, heads, scores, sink_logits, chosen, rotated)
    return _attend_and_write(cache, rows, projection.heads(), scores, sink_logits, chosen)


def _attend_and_write(
    cache: Cache, rows, heads, scores, sink_logits, chosen: Attention, rotated=None
):
    _, k, v = heads
    single = k.shape[1] == 1
    if chosen.attend == "pallas" and single and cache.scratch is None:
        call = cache, rows, heads, scores, sink_logits
        return triton.attend(*call, write=True, rotated=rotated, shared=chosen.shared)
    # A single token overwrites nothing that is visible. Written first, it is written in place: with
    # the read first, XLA copies the whole window for every layer that is not part of a loop.
    if single:
        cache = write_layer(cache, rows, k, v, chosen.compression)
    output = _attend(cache, rows, heads, scores, sink_logits, chosen, rotated)
    if not single:
        cache = write_layer(cache, rows, k, v, chosen.compression)
    return output, cache


def _attend(cache: Cache, rows, heads, scores, sink_logits, chosen: Attention, rotated=None):
    call = cache, rows, heads, scores, sink_logits
    if chosen.attend == "pallas" and heads[0].shape[1] == 1:
        return triton.attend(*call, write=False, rotated=rotated, shared=chosen.shared)[0]
    if chosen.attend == "pallas":
        return triton.attend_several(*call, rotated, shared=chosen.shared)
    if chosen.attend == "xla":
        return definition.attend(*call, chosen.shared, chosen.empty)
    return cudnn.attend(*call, decode_by=chosen.pages, empty=chosen.empty)


def _check(cache: Cache, q, k, v) -> None:
    definition.check_heads(cache, q, k, v)
    batch = cache.lengths.shape[0]
    if q.shape[0] != batch:
        raise ValueError(f"queries: got {q.shape[0]} sequences, expected the cache's {batch}")
