"""What can be done with a cache on several devices: as with one on one device, and on every shard.

`mesh` says where what lies; each function here is that of its name, run by `on_shards`.
"""

import operator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from turboquant_jax.cache import calibration as calibrations
from turboquant_jax.cache import sharing, state, updating
from turboquant_jax.cache.bytes import Bytes, count_bytes
from turboquant_jax.cache.calibration import Calibration
from turboquant_jax.cache.config import CacheConfig
from turboquant_jax.cache.layout import block_slots
from turboquant_jax.cache.mesh import (
    CONTEXT,
    DATA,
    SEQUENCES,
    TENSOR,
    TOKENS,
    by_format,
    local_config,
    on_shards,
    order_here,
    specs,
)
from turboquant_jax.cache.sharded_storage import restore as restore
from turboquant_jax.cache.sharded_storage import save as save
from turboquant_jax.cache.state import Cache
from turboquant_jax.implementation import Implementation


def create(
    mesh: Mesh,
    config: CacheConfig,
    batch: int,
    capacity: int,
    *,
    key: Array,
    num_pages: int | None = None,
    key_order: Int[Array, "layers K H"] | None = None,
    value_order: Int[Array, "layers K H"] | None = None,
    calibration: Calibration | None = None,
) -> Cache:
    """An empty cache, each shard made on its own device; arguments are those of `state.create`.

    `num_pages` are those of all shards together: of each they are its share. The codes are those of
    a cache on one device, bit for bit.

    Raises:
      ValueError: what `state.create` refuses, and what the mesh does not divide.
    """
    heads = local_config(config, mesh).num_kv_heads
    if calibration is not None:
        calibration = replace(calibration, study=None)
    make = partial(_shard, mesh, config, batch, capacity, num_pages, key)

    def of_shard(*of_heads: Any) -> Cache:
        order = order_here(config, mesh)
        return make(*jax.tree.map(lambda x: by_format(x, order, axis=0), of_heads))

    of_heads = key_order, value_order, calibration
    like = jax.eval_shape(make, *jax.tree.map(lambda x: x[:, :heads], of_heads))
    in_specs = jax.tree.map(lambda _: P(None, TENSOR), of_heads)
    made = jax.shard_map(
        of_shard, mesh=mesh, in_specs=in_specs, out_specs=specs(like), check_vma=False
    )
    return jax.jit(made)(*of_heads)


def _shard(
    mesh: Mesh | AbstractMesh,
    config: CacheConfig,
    batch: int,
    capacity: int,
    num_pages: int | None,
    key: Array,
    *of_heads: Any,
) -> Cache:
    """The arrays of a shard of an empty cache; orders and calibration are those of its heads."""
    own, shards = local_config(config, mesh), mesh.shape[DATA] * mesh.shape[CONTEXT]
    slots = block_slots(config, capacity, mesh.shape[CONTEXT])
    for name, count, of in (("batch", batch, mesh.shape[DATA]), ("pages", num_pages or 0, shards)):
        if count % of:
            raise ValueError(f"{name}: got {count} on {of} shards, expected a multiple")
    rows = batch // mesh.shape[DATA]
    pages = rows * slots if num_pages is None else num_pages // shards
    options = dict(zip(("key_order", "value_order", "calibration"), of_heads, strict=True))
    cache = state.create(own, rows, capacity, key=key, num_pages=pages, **options)
    table = state.empty_table(rows, slots, pages, dense=num_pages is None)
    return replace(cache, config=config, tables=(table,))


def planned_bytes(
    mesh: Mesh | AbstractMesh, config: CacheConfig, batch: int, capacity: int
) -> Bytes:
    """`bytes.planned_bytes` of what each device of a mesh allocates; no device is touched.

    Raises:
      ValueError: what the mesh does not divide.
    """
    own = local_config(config, mesh)
    codecs = (codec for form in own.formats for codec in (form.key, form.value))
    known = None
    if any(codec.scales != "group" for codec in codecs):
        known = calibrations.identity(own.num_layers, own.num_kv_heads, own.head_dim)
    make = partial(_shard, mesh, config, batch, capacity, None, jax.random.key(0))
    return count_bytes(jax.eval_shape(lambda: make(None, None, known)))


def begin(mesh: Mesh, cache: Cache, counts: Int[Array, " B"], most: int) -> Cache:
    """`updating.begin`; over `context`, a sequence has its pages on all shares or on none."""
    return on_shards(mesh, partial(updating.begin, most=most), (SEQUENCES,))(cache, counts)


def propose(mesh: Mesh, cache: Cache, counts: Int[Array, " B"], most: int) -> Cache:
    """`updating.propose`."""
    run = on_shards(
        mesh, partial(updating.propose, most=most), (SEQUENCES,),
        like=replace(cache, scratch=cache.window),
    )  # fmt: skip
    return run(cache, counts)


def write(
    mesh: Mesh,
    cache: Cache,
    layer: int,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    implementation: Implementation | None = None,
) -> Cache:
    """`updating.write`."""
    config = cache.config

    def of_shard(cache: Cache, k: Array, v: Array) -> Cache:
        order = order_here(config, mesh, layer)
        k, v = (by_format(x, order, axis=-2) for x in (k, v))
        return updating.write(cache, layer, k, v, implementation=implementation)

    return on_shards(mesh, of_shard, (TOKENS, TOKENS))(cache, k, v)


def commit(
    mesh: Mesh,
    cache: Cache,
    accepted: Int[Array, " B"] | None = None,
    *,
    implementation: Implementation | None = None,
) -> Cache:
    """`updating.commit`."""
    run = on_shards(
        mesh, partial(updating.commit, implementation=implementation), (SEQUENCES,),
        like=replace(cache, scratch=None),
    )  # fmt: skip
    return run(cache, accepted)


def append(
    mesh: Mesh,
    cache: Cache,
    k: Float[Array, "layers B T K H"],
    v: Float[Array, "layers B T K H"],
    counts: Int[Array, " B"] | None = None,
    *,
    implementation: Implementation | None = None,
) -> Cache:
    """`updating.append`."""
    config = cache.config

    def of_shard(cache: Cache, k: Array, v: Array, counts: Array | None) -> Cache:
        order = order_here(config, mesh)
        k, v = (by_format(x, order, axis=-2) for x in (k, v))
        return updating.append(cache, k, v, counts, implementation=implementation)

    tokens = P(None, *TOKENS)
    return on_shards(mesh, of_shard, (tokens, tokens, SEQUENCES))(cache, k, v, counts)


def fork(mesh: Mesh, cache: Cache, source: int, target: int) -> Cache:
    """`sharing.fork`.

    Raises:
      ValueError: sequences on different `data` shards, which share no pages.
    """
    rows = cache.lengths.shape[0] // mesh.shape[DATA]
    shard = operator.index(source) // rows
    if operator.index(target) // rows != shard:
        raise ValueError(
            f"fork: got sequences {source} and {target}, expected two of one shard of {rows}: they "
            "share pages"
        )

    def of_shard(cache: Cache) -> Cache:
        parts = cache.parts  # not changed, and not to be copied out of a branch
        forked = lax.cond(
            lax.axis_index(DATA) == shard,
            lambda cache: sharing.fork(cache, source % rows, target % rows),
            lambda cache: cache,
            replace(cache, parts=()),
        )
        return replace(forked, parts=parts)

    return on_shards(mesh, of_shard, ())(cache)


def free(mesh: Mesh, cache: Cache, rows: Bool[Array, " B"]) -> Cache:
    """`sharing.free`."""
    return on_shards(mesh, sharing.free, (SEQUENCES,))(cache, rows)
