"""Decoding in one pass over a text: the semantics of the cache without its bytes.

Keys and values go through the codecs and back, and query p sees of them what it would see when
decoding. Whatever evaluates a text builds on it; that the real cache, appended to token by token,
gives the same is tested.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from turboquant_jax.attention.definition import check_heads
from turboquant_jax.attention.segments import PLAIN, Scores, attend_segment, merge
from turboquant_jax.cache import CacheConfig, pre_rope, short_scales
from turboquant_jax.cache.choose import choose_compression
from turboquant_jax.cache.layout import edge, sees
from turboquant_jax.cache.state import Cache, LayerRows, Rows, rows_of
from turboquant_jax.implementation import Implementation


def teacher_forced(
    cache: Cache,
    layer: Int[Array, ""] | int,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    scores: Scores = PLAIN,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """What T steps of decoding from an empty cache would give, in one pass.

    Query p sees exactly what it would see when decoding: the first C(p) tokens behind the sinks
    compressed, all others in full precision. For evaluation: it takes T^2 time and memory. Of the
    cache only config and codecs are used, not what it holds nor how many sequences it is for.
    """
    config, rows, count = cache.config, rows_of(cache, layer), q.shape[1]
    check_heads(cache, q, k, v)
    search = choose_compression(cache, implementation).search
    k, v = (x.astype(config.dtype) for x in (k, v))
    position = jnp.arange(count)
    decoded = _decoded(cache, rows, k, v, search)
    places = Places(position, position, position)
    return attend_split(q, (k, v), decoded, places, config, scores).astype(q.dtype)


class Places(NamedTuple):
    """Positions of queries, of what is seen in full precision, and of what may be compressed."""

    query: Int[Array, " T"]
    exact: Int[Array, " S"]
    decoded: Int[Array, " R"]


def attend_split(
    q: Float[Array, "B T N H"],
    exact: tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]],
    decoded: tuple[Float[Array, "B R K H"], Float[Array, "B R K H"]],
    places: Places,
    rule: CacheConfig | Any,
    scores: Scores = PLAIN,
) -> Float[Array, "B T N H"]:
    """What queries see: tokens that are compressed by then as decoded, all others exactly.

    Args:
      q: queries.
      exact: keys and values in full precision; of all that a query sees so, none may be missing.
      decoded: keys and values as they come back from the codecs.
      places: where they are.
      rule: `sinks`, C(L) and `sliding_window`; a `CacheConfig` or what has these of one.
      scores: how scores come from products.
    """
    end = edge(rule, places.query)[:, None]

    def visible(position, compressed: bool):
        block = (position[None, :] >= rule.sinks) & (position[None, :] < end)
        seen = sees(rule, places.query[None], position[None])
        return jnp.broadcast_to(seen & (block == compressed)[None], (q.shape[0], *block.shape))

    parts = [
        attend_segment(q, *exact, visible(places.exact, False), scores),
        attend_segment(q, *decoded, visible(places.decoded, True), scores),
    ]
    return merge(parts)[0]


def center_keys(
    k: Float[Array, "B T K H"],
    first: Float[Array, "B S K H"],
    sinks: Int[Array, ""] | int,
    phases: pre_rope.Phases | None,
) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Keys less the mean of their first block, and what was taken from each; float32."""
    index = jnp.arange(k.shape[1], dtype=jnp.int32) - sinks

    def of_text(k, first):
        mean = pre_rope.mean_key(first, phases)
        taken = pre_rope.mean_at(mean, phases, index)
        return pre_rope.center(k, mean, phases, index), taken

    return jax.vmap(of_text)(k, first)


def _decoded(cache: Cache, rows: LayerRows, k, v, search: Implementation):
    """Keys and values [B, T, K, H] as they come back from the codecs."""
    config = cache.config
    centred, taken = k, jnp.zeros(k[:, :1].shape, jnp.float32)
    if config.centred:
        first = k[:, config.sinks : config.sinks + config.block]
        phases = pre_rope.create(config, k.shape[1])  # the cache's end with its capacity
        centred, taken = center_keys(k, first, config.sinks, phases)

    def through(member: Rows, values: bool):
        codec, own = cache.parts[member.part].codecs[values], member.of(cache.kv_heads)
        x = member.pick(v if values else centred, axis=2)
        groups = codec.quantize(own, x, search)
        if config.scale_bits == 8:
            groups = tuple(
                (codes, None if s is None else short_scales.through(s, config.sinks, config.block))
                for codes, s in groups
            )
        return codec.unrotate(own, codec.dequantize(groups))

    keys, values = (
        rows.join([through(member, which) for member in rows.members], axis=2)
        for which in (False, True)
    )
    return keys + taken, values
