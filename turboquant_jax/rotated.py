"""Queries into the rotated space of the keys, outputs back from that of the values, head by head.

Compressed blocks never leave the rotated space: <q, x~> = s <Pi q, c>. The centre of the keys adds
<q, mean> to every score over them.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from turboquant_jax.cache.codec import Codec
from turboquant_jax.cache.state import Cache


def mean_products(cache: Cache, layer, q: Float[Array, "B T N H"]) -> Float[Array, "B T N"] | None:
    """<q, mean key>, which centring took from every compressed key; None without centring."""
    if cache.key_mean is None:
        return None
    grouped = _group(q.astype(jnp.float32), cache.config.num_kv_heads)
    return jnp.einsum("btkgh,bkh->btkg", grouped, cache.key_mean[layer]).reshape(q.shape[:-1])


def rotate_queries(codec: Codec, layer, q: Float[Array, "B T N H"], kv_heads: int):
    """Queries in the rotated space of the keys, float32."""
    return _ungroup(codec.rotate(layer, _heads_last(_group(q, kv_heads))), q)


def unrotate_outputs(codec: Codec, layer, output: Float[Array, "B T N H"], kv_heads: int):
    """Outputs back from the rotated space of the values."""
    return _ungroup(codec.unrotate(layer, _heads_last(_group(output, kv_heads))), output)


def _group(x: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "B T K G H"]:
    return x.reshape(*x.shape[:2], kv_heads, -1, x.shape[3])


def _heads_last(x: Float[Array, "B T K G H"]) -> Float[Array, "B T G K H"]:
    return jnp.swapaxes(x, 2, 3)


def _ungroup(x: Float[Array, "B T G K H"], like: Float[Array, "B T N H"]):
    return jnp.swapaxes(x, 2, 3).reshape(like.shape)
