"""The compressed cache as the past of a generation."""

from jaxtyping import Array, Float, Int

from turboquant_jax import cache
from turboquant_jax.attention import attend
from turboquant_jax.cache import Cache
from turboquant_jax.llama.generate import Past


def _attend(
    state: Cache,
    layer: Int[Array, ""],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
) -> tuple[Float[Array, "B T N H"], Cache]:
    out = attend(state, layer, q, k, v)
    return out, cache.write(state, layer, k, v)


COMPRESSED = Past(cache.begin, _attend, cache.commit)
"""Attend to the cache and the new tokens, then append these; look at `overflow` afterwards."""
