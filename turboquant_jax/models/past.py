"""The compressed cache as the past of a generation."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from turboquant_jax import cache
from turboquant_jax.attention import Projection, attend_projection
from turboquant_jax.attention import sharding as attention_sharding
from turboquant_jax.cache import Cache, sharding
from turboquant_jax.cache.state import LayerRows, rows_of
from turboquant_jax.implementation import Implementation
from turboquant_jax.models.generate import Past


@functools.cache
def compressed(implementation: Implementation | None = None, shared_blocks: int = 0) -> Past[Cache]:
    """Attend to the cache and the new tokens, then append these; look at `overflow` afterwards.

    Where layers differ in their bits the decoder must be unstacked. The arguments are those of
    `attention.attend`. The same `Past` for the same arguments.
    """

    # compiled apart, so that the layers of an unstacked decoder are traced and lowered once
    @functools.partial(jax.jit, static_argnames="empty")
    def attend_rows(
        state: Cache, rows: LayerRows, projection: Projection, empty: bool
    ) -> tuple[Float[Array, "B T N H"], Cache]:
        how = dict(implementation=implementation, shared_blocks=shared_blocks, empty=empty)
        return attend_projection(state, rows, projection, **how)

    def attend(
        state: Cache, layer: Int[Array, ""], projection: Projection, empty: bool = False
    ) -> tuple[Float[Array, "B T N H"], Cache]:
        return attend_rows(state, rows_of(state, layer), projection, empty)

    compress: Implementation | None = "xla" if implementation == "xla" else None
    commit = functools.partial(cache.commit, implementation=compress)
    first = None if shared_blocks else functools.partial(attend, empty=True)
    return Past(cache.begin, attend, commit, cache.propose, _room, first)


@functools.cache
def on_mesh(mesh: Mesh, implementation: Implementation | None = None) -> Past[Cache]:
    """`compressed` for a cache and a decoder on several devices (`cache.sharding`)."""

    # compiled apart, so that the layers of an unstacked decoder are traced and lowered once
    @jax.jit
    def attend_layer(
        state: Cache, layer: Int[Array, ""], projection: Projection
    ) -> tuple[Float[Array, "B T N H"], Cache]:
        return attention_sharding.attend_projection(
            mesh, state, layer, projection, implementation=implementation
        )

    def attend(
        state: Cache, layer: Int[Array, ""], projection: Projection
    ) -> tuple[Float[Array, "B T N H"], Cache]:
        if len(state.parts) == 1:
            return attend_layer(state, jnp.asarray(layer, jnp.int32), projection)
        return attention_sharding.attend_projection(
            mesh, state, layer, projection, implementation=implementation
        )

    compress: Implementation | None = "xla" if implementation == "xla" else None
    return Past(
        functools.partial(sharding.begin, mesh),
        attend,
        functools.partial(sharding.commit, mesh, implementation=compress),
        functools.partial(sharding.propose, mesh),
        _room,
    )


def _room(state: Cache) -> Int[Array, " B"]:
    return state.layout.until_block(state.lengths)


COMPRESSED = compressed()
"""By the kernel where it is served, through XLA elsewhere."""
