"""Attention over a cache on a mesh: compiled ahead, and timed."""

import statistics
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.speed.common import CHANNELS, HEADS, KV_HEADS, cache_config
from experiments.speed.sharded_decoder import COMPILERS, replicated_shapes
from turboquant_jax import attention, cache
from turboquant_jax.attention import sharding as attention_sharding
from turboquant_jax.cache import Cache, CacheConfig, sharding
from turboquant_jax.models.sharding import past_shardings, placed
from turboquant_jax.models.timing import filled_cache

_ROOM = 64


@dataclass(frozen=True)
class Attention:
    """Attention of the layers of a cache, one after another, in a loop on the device."""

    mesh: Mesh | None
    batch: int
    tokens: int
    layers: int
    steps: int
    compiler: str = ""

    def compiled(self) -> Any:
        """The loop, compiled for shapes alone."""
        state = jax.eval_shape(self._empty)
        new = jax.eval_shape(partial(queries, self.batch))
        if self.mesh is not None:
            state = placed(state, past_shardings(state, self.mesh))
            new = replicated_shapes(new, self.mesh)
        options = COMPILERS[self.compiler]
        return jax.jit(self._loop).lower(state, *new).compile(compiler_options=options)

    def seconds(self, repeats: int) -> float:
        """Of one layer's attention, the median of loops; the first one does not count."""
        run, new, seconds = self.compiled(), queries(self.batch), []
        sizes = self.batch, self.tokens, self.tokens + _ROOM
        state = filled_cache(self._cache, *sizes, mesh=self.mesh)
        if self.mesh is not None:
            new = jax.device_put(new, NamedSharding(self.mesh, P()))
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            jax.block_until_ready(run(state, *new))
            seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds[1:]) / self.steps / self.layers

    @property
    def _cache(self) -> CacheConfig:
        return cache_config(self.layers, 4, "pre_rope")

    def _empty(self) -> Cache:
        key, capacity = jax.random.key(0), self.tokens + _ROOM
        if self.mesh is None:
            return cache.create(self._cache, self.batch, capacity, key=key)
        return sharding.create(self.mesh, self._cache, self.batch, capacity, key=key)

    def _loop(self, state: Cache, q: jax.Array, new: tuple) -> jax.Array:
        attend = attention.attend
        if self.mesh is not None:
            attend = partial(attention_sharding.attend, self.mesh)

        def step(_: Any, q: jax.Array) -> jax.Array:
            for layer in range(self.layers):
                q = attend(state, layer, q, *new)
            return q

        return lax.fori_loop(0, self.steps, step, q)


def queries(batch: int) -> tuple[jax.Array, tuple]:
    """Of one token a sequence the query, and its key and value."""
    q = jax.random.normal(jax.random.key(4), (batch, 1, HEADS, CHANNELS), jnp.bfloat16)
    shape = batch, 1, KV_HEADS, CHANNELS
    return q, tuple(jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in (5, 6))
