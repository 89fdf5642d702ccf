"""Attention over a compressed cache, in the rotated space.

A chunk of T new tokens sees the cache as it stands, and itself, causally and in full precision;
only then is it appended. Decoding is the case T = 1, prefill any other, and the rule is one.

Compressed blocks never leave the rotated space: <q, x~> = s <Pi q, c>, so the query is rotated once
and the output rotated back once (TurboQuant, arXiv:2504.19874; theory in the identities of its
section 3). The centre of the keys adds <q, mean> to every score of the compressed segment.
"""

from functools import partial
from typing import Literal

import jax.numpy as jnp
from jax import tree
from jaxtyping import Array, Bool, Float, Int

from turboquant_jax import fused, prefill, rotated
from turboquant_jax.cache import appending
from turboquant_jax.cache import blocks as block_layout
from turboquant_jax.cache.config import CacheConfig
from turboquant_jax.cache.state import Cache
from turboquant_jax.segments import PLAIN, Part, Scores, attend_exact, merge, sink_part

Implementation = Literal["xla", "pallas", "cudnn"]


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
) -> Float[Array, "B T N H"]:
    """Attention of T new tokens over the cache of a layer and over themselves.

    Args:
      cache: holds `lengths` tokens of each sequence; the new tokens are not in it yet.
      layer: which layer of the cache.
      q, k, v: of the new tokens, after RoPE; N query heads share K heads in groups of N / K.
        Rows of padding at the end of a chunk change nothing for the rows before them.
      scores: scale and soft cap.
      sink_logits: one learned logit per query head that takes part in the softmax without a value
        (GPT-OSS).
      implementation: "xla" is the definition; "pallas" the GPU kernel, for T = 1; "cudnn" the
        vendor's attention over the chunk and over tiles of the past, for T > 1. None takes what
        the device and the call are served by.

    Returns:
      The output in the dtype of q.

    Raises:
      ValueError: shapes that do not fit the cache, or an unknown implementation.
      NotImplementedError: an implementation that this device or call is not served by.
    """
    layer = jnp.asarray(layer, jnp.int32)
    check_shapes(cache.config, cache.lengths.shape[0], q, k, v)
    chosen = _implementation(implementation, cache, q, scores)
    if chosen == "pallas":
        return attend_pallas(cache, layer, q, k, v, scores, sink_logits)[0]
    attend = _attend_xla if chosen == "xla" else prefill.attend
    return attend(cache, layer, q, k, v, scores, sink_logits)


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
    rotated: Float[Array, "B N H"] | None = None,
) -> tuple[Float[Array, "B T N H"], Cache]:
    """`attend`, then `cache.write` of the pending tokens, in one kernel where it is served.

    Between `cache.begin` and `cache.commit`; arguments and errors are those of `attend`. `rotated`
    saves the kernel the rotation of the queries, where `fused.turn` has made it.
    """
    layer = jnp.asarray(layer, jnp.int32)
    check_shapes(cache.config, cache.lengths.shape[0], q, k, v)
    chosen = _implementation(implementation, cache, q, scores)
    if chosen == "pallas":
        return attend_pallas(
            cache, layer, q, k, v, scores, sink_logits, write=True, rotated=rotated
        )
    # A single token overwrites nothing that is visible. Written first, it is written in place: with
    # the read first, XLA copies the whole window for every layer that is not part of a loop.
    write = partial(appending.write, implementation="xla" if chosen == "xla" else None)
    if q.shape[1] == 1:
        cache = write(cache, layer, k, v)
    attend = _attend_xla if chosen == "xla" else prefill.attend
    output = attend(cache, layer, q, k, v, scores, sink_logits)
    return output, cache if q.shape[1] == 1 else write(cache, layer, k, v)


def _attend_xla(cache: Cache, layer, q, k, v, scores: Scores, sink_logits):
    """The definition that a kernel must equal."""
    parts = [_attend_recent(cache, layer, q, k, v, scores)]
    if cache.page_table.shape[1]:
        parts.append(_attend_blocks(cache, layer, q, scores))
    if sink_logits is not None:
        parts.append(sink_part(sink_logits, q.shape))
    return merge(parts)[0].astype(q.dtype)


def _attend_recent(cache: Cache, layer, q, k, v, scores: Scores) -> Part:
    """Sinks, window and the new tokens themselves: everything in full precision."""
    dtype = cache.config.dtype
    keys = [cache.sinks.keys[layer], cache.window.keys[layer], k.astype(dtype)]
    values = [cache.sinks.values[layer], cache.window.values[layer], v.astype(dtype)]
    config, lengths = cache.config, cache.lengths[:, None]
    query = lengths + jnp.arange(q.shape[1])[None, :]
    sink = jnp.arange(cache.sinks.keys.shape[2])[None, :] + jnp.zeros_like(lengths)
    slot = jnp.arange(cache.window.keys.shape[2])[None, :]
    newest = lengths - 1 - config.sinks
    ring = newest - (newest - slot) % max(slot.shape[1], 1) + config.sinks
    compressed = config.sinks + config.compressed_tokens(lengths)
    position = jnp.concatenate([sink, ring, query], axis=1)
    held = jnp.concatenate([sink < lengths, (ring >= compressed) & (ring >= 0), query >= 0], axis=1)
    visible = held[:, None, :] & sees(config, query, position)
    return attend_exact(q, jnp.concatenate(keys, 1), jnp.concatenate(values, 1), visible, scores)


def _attend_blocks(cache: Cache, layer, q, scores: Scores) -> Part:
    """The compressed blocks."""
    config, (key_codec, value_codec) = cache.config, cache.codecs
    table = jnp.maximum(cache.page_table, 0)
    pages = tree.map(lambda pool: pool[layer, table], cache.pool)  # [B, slots, K, ...]
    keys, values = block_layout.unpack(cache.codecs, pages)

    def by_token(vectors):  # [B, slots, K, T, H] -> [B, S, K, H]
        return jnp.moveaxis(vectors, 2, 3).reshape(
            table.shape[0], -1, config.num_kv_heads, config.head_dim
        )

    position, held = block_positions(cache)
    query = cache.lengths[:, None] + jnp.arange(q.shape[1])[None, :]
    output, lse = attend_exact(
        rotated.rotate_queries(key_codec, layer, q, config.num_kv_heads),
        by_token(key_codec.dequantize(keys)),
        by_token(value_codec.dequantize(values)),
        held[:, None, :] & sees(config, query, position),
        scores,
        rotated.mean_products(cache, layer, q),
    )
    return rotated.unrotate_outputs(value_codec, layer, output, config.num_kv_heads), lse


def attend_pallas(
    cache: Cache,
    layer: Int[Array, ""],
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "B 1 K H"],
    v: Float[Array, "B 1 K H"],
    scores: Scores,
    sink_logits: Float[Array, " N"] | None,
    *,
    write: bool = False,
    rotated: Float[Array, "B N H"] | None = None,
) -> tuple[Float[Array, "B 1 N H"], Cache]:
    """All segments in one fused kernel, for one query per sequence; `write` writes the token."""
    config = cache.config
    output, cache = fused.attend(
        cache,
        layer,
        q[:, 0],
        (k.astype(config.dtype), v.astype(config.dtype)),
        scale=scores.factor(config.head_dim),
        softcap=scores.softcap,
        sink_logits=sink_logits,
        write=write,
        rotated=rotated,
    )
    return output[:, None], cache


def block_positions(cache: Cache) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
    """Positions of the tokens in a sequence's slots of blocks, and which slots hold any."""
    config, slots = cache.config, cache.page_table.shape[1]
    last = config.num_blocks(cache.lengths)[:, None] - 1
    block = last - (last - jnp.arange(slots)[None, :]) % slots
    token = jnp.arange(config.block)[None, None, :]
    position = config.sinks + block[..., None] * config.block + token
    held = jnp.broadcast_to((block >= 0)[..., None], position.shape)
    return position.reshape(block.shape[0], -1), held.reshape(block.shape[0], -1)


def sees(
    config: CacheConfig, query: Int[Array, "B T"], position: Int[Array, "B S"]
) -> Bool[Array, "B T S"]:
    """Which positions a query sees: causal, within the sliding window where there is one."""
    distance = query[:, :, None] - position[:, None, :]
    seen = distance >= 0
    return seen if config.sliding_window is None else seen & (distance < config.sliding_window)


def _implementation(
    implementation: Implementation | None, cache: Cache, q: Float[Array, "B T N H"], scores: Scores
) -> Implementation:
    """What is to run: a name is obeyed or refused, None takes what is served, fastest first."""
    if implementation not in ("xla", "pallas", "cudnn", None):
        raise ValueError(
            f"implementation must be 'xla', 'pallas', 'cudnn' or None, got {implementation!r}"
        )
    reasons: dict[Implementation, str | None] = {
        "pallas": fused.unserved(cache, q.shape[1]),
        "cudnn": prefill.unserved(cache, q, scores),
        "xla": None,
    }
    if implementation is None:
        return next(name for name, reason in reasons.items() if reason is None)
    if reasons[implementation] is not None:
        raise NotImplementedError(
            f"implementation={implementation!r} got {reasons[implementation]}"
        )
    return implementation


def check_shapes(config: CacheConfig, batch: int, q, k, v) -> None:
    """ValueError unless queries, keys and values are new tokens of such a cache."""
    expected = (batch, q.shape[1], config.num_kv_heads, config.head_dim)
    if k.shape != expected or v.shape != expected:
        raise ValueError(f"keys and values must be {expected}, got {k.shape} and {v.shape}")
    if q.shape[0] != batch or q.shape[3] != config.head_dim or q.shape[2] % expected[2]:
        raise ValueError(
            f"queries must be ({batch}, T, N, {config.head_dim}) with N a multiple of "
            f"{config.num_kv_heads}, got {q.shape}"
        )
