"""Decoding in one pass over a text: the semantics of the cache without its bytes.

Keys and values go through the codecs and back, and query p sees of them what it would see when
decoding. Whatever evaluates a text builds on it; that the real cache, appended to token by token,
gives the same is tested.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from turboquant_jax.attention import check_shapes, sees
from turboquant_jax.cache.codec import Codec
from turboquant_jax.cache.config import CacheConfig
from turboquant_jax.segments import PLAIN, Scores, attend_exact, merge


def teacher_forced(
    config: CacheConfig,
    codecs: tuple[Codec, Codec],
    layer: Int[Array, ""] | int,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    scores: Scores = PLAIN,
) -> Float[Array, "B T N H"]:
    """What T steps of decoding from an empty cache would give, in one pass.

    Query p sees exactly what it would see when decoding: the first C(p) tokens behind the sinks
    compressed, all others in full precision. For evaluation: it takes T^2 time and memory.
    """
    layer, count = jnp.asarray(layer, jnp.int32), q.shape[1]
    check_shapes(config, q.shape[0], q, k, v)
    key_codec, value_codec = codecs
    k, v = (x.astype(config.dtype).astype(jnp.float32) for x in (k, v))
    mean = jnp.zeros_like(k[:, :1])
    if config.center_keys:
        mean = jnp.mean(k[:, config.sinks : config.sinks + config.block], axis=1, keepdims=True)
    compressed_k = key_codec.dequantize(key_codec.quantize(layer, k - mean))
    compressed_v = value_codec.dequantize(value_codec.quantize(layer, v))
    compressed_k = key_codec.unrotate(layer, compressed_k) + mean
    compressed_v = value_codec.unrotate(layer, compressed_v)
    position = jnp.arange(count)
    edge = config.sinks + config.compressed_tokens(position)
    is_block = (position[None, :] >= config.sinks) & (position[None, :] < edge[:, None])
    seen = sees(config, position[None, :], position[None, :])
    visible = jnp.broadcast_to(seen, (q.shape[0], count, count))
    parts = [
        attend_exact(q, k, v, visible & ~is_block[None, :, :], scores),
        attend_exact(q, compressed_k, compressed_v, visible & is_block[None, :, :], scores),
    ]
    return merge(parts)[0].astype(q.dtype)
