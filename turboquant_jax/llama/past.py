"""The compressed cache as the past of a generation, with the same bits in all layers or not."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from turboquant_jax import cache, fused
from turboquant_jax.attention import Implementation, attend_and_write
from turboquant_jax.cache import Cache, MixedCache, mixed
from turboquant_jax.llama.generate import Past
from turboquant_jax.llama.model import BeforeRope, split_heads


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

    @jax.jit
    def project(
        state: Cache,
        layer: Int[Array, ""],
        qkv: Float[Array, "B T K G+2 H"],
        cos: Float[Array, "B T H/2"],
        sin: Float[Array, "B T H/2"],
    ) -> tuple[Float[Array, "B T N H"], Cache]:
        served = qkv.dtype == jnp.bfloat16 and fused.unserved(state, qkv.shape[1]) is None
        if implementation == "xla" or not served:
            return attend(state, layer, *split_heads(qkv, cos, sin))
        *new, rotated = fused.turn(state, layer, qkv[:, 0], cos[:, 0], sin[:, 0])
        q, k, v = (x[:, None] for x in new)
        return attend_and_write(
            state, layer, q, k, v, implementation=implementation, rotated=rotated
        )

    compress = _compress(implementation)
    commit = functools.partial(cache.commit, implementation=compress)
    return Past(cache.begin, BeforeRope(attend, project), commit)


@functools.cache
def compressed_mixed(implementation: Implementation | None = None) -> Past[MixedCache]:
    """The same for a cache whose layers have bits of their own; the decoder must be unstacked.

    Layers of the same bits are traced and lowered once.
    """
    one = compressed(implementation).attend
    assert isinstance(one, BeforeRope)

    def of_part(run: Callable[..., Any]) -> Callable[..., Any]:
        """The same for the layer of a part."""

        def attend(
            state: MixedCache, layer: Int[Array, ""], *arguments: Array
        ) -> tuple[Float[Array, "B T N H"], MixedCache]:
            part, index = mixed.select(state, layer)
            output, part = run(part, jnp.int32(index), *arguments)
            return output, mixed.update(state, layer, part)

        return attend

    attend = BeforeRope(of_part(one.attend), of_part(one.project))
    compress = _compress(implementation)
    return Past(mixed.begin, attend, functools.partial(mixed.commit, implementation=compress))


def _compress(implementation: Implementation | None) -> Literal["xla"] | None:
    return "xla" if implementation == "xla" else None


COMPRESSED = compressed()
"""By the kernel where it is served, through XLA elsewhere."""

MIXED = compressed_mixed()
"""`COMPRESSED` for a `MixedCache`."""
