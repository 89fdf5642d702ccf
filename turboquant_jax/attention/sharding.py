"""Attention over a cache on several devices: `api` on every shard, with its own heads and blocks.

Queries and outputs lie as keys do: over `tensor` the query heads of a shard are those of its kv
heads, and over `context` every shard has them all. There what each has made of its blocks is joined
by the log-sum-exp, in one collective a layer (`segments.over_shares`).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from turboquant_jax.attention import api
from turboquant_jax.attention.projection import Projection
from turboquant_jax.attention.segments import PLAIN, Scores
from turboquant_jax.cache.mesh import (
    DATA,
    TENSOR,
    TOKENS,
    by_format,
    on_shards,
    order_here,
)
from turboquant_jax.cache.state import Cache
from turboquant_jax.implementation import Implementation


def attend(
    mesh: Mesh,
    cache: Cache,
    layer: Int[Array, ""] | int,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    scores: Scores = PLAIN,
    sink_logits: Float[Array, " N"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """`api.attend`."""

    own = partial(api.attend, scores=scores, implementation=implementation)

    def call(cache: Cache, *given: Any, **options: Any) -> tuple[Array, Cache]:
        return own(cache, *given, **options), cache

    return _on_heads(mesh, cache, layer, call, (q, k, v), sink_logits)[0]


def attend_and_write(
    mesh: Mesh,
    cache: Cache,
    layer: Int[Array, ""] | int,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    scores: Scores = PLAIN,
    sink_logits: Float[Array, " N"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N H"], Cache]:
    """`api.attend_and_write`."""

    call = partial(api.attend_and_write, scores=scores, implementation=implementation)
    return _on_heads(mesh, cache, layer, call, (q, k, v), sink_logits)


def attend_projection(
    mesh: Mesh,
    cache: Cache,
    layer: Int[Array, ""] | int,
    projection: Projection,
    *,
    sink_logits: Float[Array, " N"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N H"], Cache]:
    """`api.attend_projection`."""

    call = partial(api.attend_projection, implementation=implementation)
    return _on_heads(mesh, cache, layer, call, (projection,), sink_logits)


def _on_heads(
    mesh: Mesh,
    cache: Cache,
    layer: Int[Array, ""] | int,
    call: Callable[..., tuple[Array, Cache]],
    heads: tuple,
    sink_logits: Float[Array, " N"] | None,
) -> tuple[Float[Array, "B T N H"], Cache]:
    """`call(cache, layer, *heads, sink_logits=)` of every shard with its heads: queries, keys and
    values, or a projection of them.
    """
    config = cache.config

    def of_shard(cache: Cache, heads: tuple, sinks: Array | None) -> tuple[Cache, Array]:
        order = order_here(config, mesh, layer)
        if order is None:
            return call(cache, layer, *heads, sink_logits=sinks)[::-1]
        if isinstance(heads[0], Projection):
            heads = (replace(heads[0], qkv=by_format(heads[0].qkv, order, axis=2)),)
            group = heads[0].qkv.shape[3] - 2
        else:
            group = heads[0].shape[2] // order.shape[0]
        of_queries = (order[:, None] * group + jnp.arange(group)[None, :]).ravel()
        if len(heads) == 3:
            orders = of_queries, order, order
            heads = tuple(by_format(x, o, axis=2) for x, o in zip(heads, orders, strict=True))
        sinks = None if sinks is None else by_format(sinks, of_queries, axis=0)
        output, cache = call(cache, layer, *heads, sink_logits=sinks)
        return cache, by_format(output, jnp.argsort(of_queries), axis=2)

    def spec(x: Any) -> Any:
        if not isinstance(x, Projection):
            return TOKENS
        return jax.tree.unflatten(jax.tree.structure(x), [TOKENS, P(DATA), P(DATA)])

    in_specs = tuple(map(spec, heads)), P(TENSOR)
    run = on_shards(mesh, of_shard, in_specs, (TOKENS,))
    cache, output = run(cache, heads, sink_logits)
    return output, cache
