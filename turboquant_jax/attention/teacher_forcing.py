"""Decoding in one pass over a text: the semantics of the cache without its bytes.

Keys and values go through the codecs and back, and query p sees of them what it would see when
decoding. Whatever evaluates a text builds on it; that the real cache, appended to token by token,
gives the same is tested.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from turboquant_jax.attention.definition import check_heads
from turboquant_jax.attention.segments import PLAIN, Scores, attend_segment, merge
from turboquant_jax.cache import pre_rope
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
    first, end = config.sinks, edge(config, position)
    is_block = (position[None, :] >= first) & (position[None, :] < end[:, None])
    seen = sees(config, position[None, :], position[None, :])
    visible = jnp.broadcast_to(seen, (q.shape[0], count, count))
    decoded_k, decoded_v = _decoded(cache, rows, k, v, search)
    parts = [
        attend_segment(q, k, v, visible & ~is_block[None, :, :], scores),
        attend_segment(q, decoded_k, decoded_v, visible & is_block[None, :, :], scores),
    ]
    return merge(parts)[0].astype(q.dtype)


def _decoded(cache: Cache, rows: LayerRows, k, v, search: Implementation):
    """Keys and values [B, T, K, H] as they come back from the codecs."""
    config = cache.config
    centred, taken = k, jnp.zeros_like(k[:, :1])
    if config.center_keys:
        first = k[:, config.sinks : config.sinks + config.block]
        phases = pre_rope.create(config, k.shape[1])  # the cache's end with its capacity
        mean = jax.vmap(partial(pre_rope.mean_key, phases=phases))(first)
        index = jnp.arange(k.shape[1], dtype=jnp.int32) - config.sinks
        taken = jax.vmap(partial(pre_rope.mean_at, phases=phases, index=index))(mean)
        centred = jax.vmap(partial(pre_rope.center, phases=phases, index=index))(k, mean)

    def through(member: Rows, values: bool):
        codec, own = cache.parts[member.part].codecs[values], member.of(cache.kv_heads)
        x = member.pick(v if values else centred, axis=2)
        return codec.unrotate(own, codec.dequantize(codec.quantize(own, x, search)))

    keys, values = (
        rows.join([through(member, which) for member in rows.members], axis=2)
        for which in (False, True)
    )
    return keys + taken, values
