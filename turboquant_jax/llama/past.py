"""The compressed cache as the past of a generation."""

import functools
from typing import Literal

import jax
from jaxtyping import Array, Float, Int

from turboquant_jax import cache
from turboquant_jax.attention import Implementation, attend_and_write
from turboquant_jax.cache import Cache
from turboquant_jax.llama.generate import Past


@functools.cache
def compressed(implementation: Implementation | None = None) -> Past[Cache]:
    """Attend to the cache and the new tokens, then append these; look at `overflow` afterwards.

    `implementation` is that of `attention.attend`. The same `Past` for the same argument.
    """

    # compiled apart, so that the layers of an unstacked decoder are traced and lowered once
    @jax.jit
    def attend(
        state: Cache,
        layer: Int[Array, ""],
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
    ) -> tuple[Float[Array, "B T N H"], Cache]:
        return attend_and_write(state, layer, q, k, v, implementation=implementation)

    compress: Literal["xla"] | None = "xla" if implementation == "xla" else None
    return Past(cache.begin, attend, functools.partial(cache.commit, implementation=compress))


COMPRESSED = compressed()
"""By the kernel where it is served, through XLA elsewhere."""
