"""The compressed cache as the past of a generation."""

import functools

import jax
from jaxtyping import Array, Float, Int

from turboquant_jax import cache
from turboquant_jax.attention import Implementation, attend
from turboquant_jax.cache import Cache
from turboquant_jax.llama.generate import Past


@functools.cache
def compressed(implementation: Implementation | None = None) -> Past[Cache]:
    """Attend to the cache and the new tokens, then append these; look at `overflow` afterwards.

    `implementation` is that of `attention.attend`. The same `Past` for the same argument.
    """

    # compiled apart, so that the layers of an unstacked decoder are traced and lowered once
    @jax.jit
    def attend_and_write(
        state: Cache,
        layer: Int[Array, ""],
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
    ) -> tuple[Float[Array, "B T N H"], Cache]:
        # A single token overwrites nothing that is visible. Written first, it is in place: with the
        # read first, XLA copies the whole window in every layer of an unstacked decoder.
        if q.shape[1] == 1:
            state = cache.write(state, layer, k, v)
        out = attend(state, layer, q, k, v, implementation=implementation)
        return out, state if q.shape[1] == 1 else cache.write(state, layer, k, v)

    return Past(cache.begin, attend_and_write, cache.commit)


COMPRESSED = compressed()
"""By the kernel where it is served, through XLA elsewhere."""
