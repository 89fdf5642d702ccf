"""The compressed cache as the past of a generation, with the same bits in all layers or not."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from turboquant_jax import cache
from turboquant_jax.attention import Implementation, attend_and_write
from turboquant_jax.cache import Cache, MixedCache, mixed
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

    compress = _compress(implementation)
    return Past(cache.begin, attend, functools.partial(cache.commit, implementation=compress))


@functools.cache
def compressed_mixed(implementation: Implementation | None = None) -> Past[MixedCache]:
    """The same for a cache whose layers have bits of their own; the decoder must be unstacked.

    Layers of the same bits are traced and lowered once.
    """
    one = compressed(implementation)

    def attend(
        state: MixedCache,
        layer: Int[Array, ""],
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
    ) -> tuple[Float[Array, "B T N H"], MixedCache]:
        part, index = mixed.select(state, layer)
        output, part = one.attend(part, jnp.int32(index), q, k, v)
        return output, mixed.update(state, layer, part)

    compress = _compress(implementation)
    return Past(mixed.begin, attend, functools.partial(mixed.commit, implementation=compress))


def _compress(implementation: Implementation | None) -> Literal["xla"] | None:
    return "xla" if implementation == "xla" else None


COMPRESSED = compressed()
"""By the kernel where it is served, through XLA elsewhere."""

MIXED = compressed_mixed()
"""`COMPRESSED` for a `MixedCache`."""
