"""A cache over several devices: which axis of which array lies on which axis of a mesh.

    data      sequences; each shard has pages of its own
    tensor    kv heads; the rows of a part, (layer, kv head) pairs, are those of the first shard,
              then those of the second, ...
    context   blocks: stripes of a sequence's tokens, dealt in turn (`layout.Share`); sinks and
              window are on all of them

A shard of a cache is a cache: its arrays are local, its configuration has the shard's heads, and
whatever works on a cache works on it, kernels too. `on_shards` runs a function so. Pages are never
shared between shards, so a page table has the numbers of its own shard's pages. Over `data` and
`tensor` nothing is exchanged; over `context` whether pages are there, and in attention what each
shard has made of its blocks (`segments.over_shares`).

Heads of several formats: every shard has as many of each, and takes its own in the order of their
formats, so that one program fits all.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, Shaped

from turboquant_jax.cache import layout
from turboquant_jax.cache.allocation import Allocation
from turboquant_jax.cache.config import CacheConfig
from turboquant_jax.cache.layout import Share
from turboquant_jax.cache.state import Cache

AXES = DATA, TENSOR, CONTEXT = "data", "tensor", "context"
SEQUENCES = P(DATA)
"""Of arrays [B]."""
TOKENS = P(DATA, None, TENSOR)
"""Of queries, keys and values [B, T, heads, H], which every context shard has."""


_EXACT = P(None, DATA, None, TENSOR)
_SPECS = (  # of what is below a field of this name, the first that fits; elsewhere all shards agree
    ("page_table", P(DATA, CONTEXT)),
    ("pending_pages", P(DATA, CONTEXT)),
    ("references", P((DATA, CONTEXT))),
    ("tables", SEQUENCES),
    ("sinks", _EXACT),
    ("window", _EXACT),
    ("scratch", _EXACT),
    ("key_mean", P(None, DATA, TENSOR)),
    ("order", P(TENSOR)),
    ("transform", P(TENSOR)),
    ("pool", P(TENSOR, (DATA, CONTEXT))),
)


def make_mesh(data: int = 1, tensor: int = 1, context: int = 1, devices: Any = None) -> Mesh:
    """Devices in the shape [data, tensor, context]: all of them, or the first ones of a list.

    Raises:
      ValueError: axes that are not positive, or fewer devices than they have places.
    """
    sizes = data, tensor, context
    devices = np.asarray(jax.devices() if devices is None else devices)
    count = data * tensor * context
    if min(sizes) < 1 or count > devices.size:
        raise ValueError(
            f"mesh: got data={data}, tensor={tensor}, context={context}, "
            f"expected positive sizes for at most {devices.size} devices"
        )
    return Mesh(devices.ravel()[:count].reshape(sizes), AXES)


def abstract_mesh(data: int = 1, tensor: int = 1, context: int = 1) -> AbstractMesh:
    """A mesh without devices, to plan for."""
    return AbstractMesh((data, tensor, context), AXES)


def on_shards(
    mesh: Mesh,
    function: Callable[..., Any],
    in_specs: tuple,
    out_specs: tuple | None = None,
    like: Cache | None = None,
) -> Callable[..., Any]:
    """`function(cache, *arguments)` of every shard of a cache.

    Args:
      mesh: of `make_mesh`, on which the cache was created.
      function: gets the cache of its shard, and gives one back, alone or before other outputs.
      in_specs: a partition spec, or a pytree of them, for each argument.
      out_specs: those of the other outputs, as a tuple; None if there are none.
      like: a cache that has the arrays of the one given back, if those are others.
    """
    shares = mesh.shape[CONTEXT]

    def run(cache: Cache, *arguments: Any) -> Any:
        whole, own = cache.config, local_config(cache.config, mesh)

        def of_shard(cache: Cache, *arguments: Any) -> Any:
            share = Share(lax.axis_index(CONTEXT), shares) if shares > 1 else None
            made = function(replace(cache, config=own, share=share), *arguments)
            cache, *others = (made,) if out_specs is None else made
            cache = replace(cache, config=whole, share=None)
            return cache if out_specs is None else (cache, *others)

        given, made = specs(cache), specs(cache if like is None else like)
        outs = made if out_specs is None else (made, *out_specs)
        run_all = jax.shard_map(
            of_shard, mesh=mesh, in_specs=(given, *in_specs), out_specs=outs, check_vma=False
        )
        return run_all(cache, *arguments)

    return run


def specs(cache: Cache) -> Cache:
    """The partition spec of every array of a cache, as a pytree like it."""

    def of_leaf(path: tuple, leaf: Any) -> P:
        names = {getattr(key, "name", None) for key in path}
        return next((spec for name, spec in _SPECS if name in names), P())

    return jax.tree_util.tree_map_with_path(of_leaf, cache)


def local_config(config: CacheConfig, mesh: Mesh | AbstractMesh) -> CacheConfig:
    """The configuration of a shard: its heads, in the order of their formats.

    Raises:
      ValueError: heads that the mesh does not divide, or of which the shards would not hold as many
        of each format; a context that is split behind a sliding window, or in blocks that do not
        fill a stripe.
    """
    tensor, shares = mesh.shape[TENSOR], mesh.shape[CONTEXT]
    if config.num_kv_heads % tensor:
        raise ValueError(
            f"tensor: got {tensor} shards of {config.num_kv_heads} kv heads, expected a divisor of "
            "them: split the context, or repeat heads (`models.sharding.repeated_heads`)"
        )
    if shares > 1 and config.sliding_window is not None:
        raise ValueError(
            f"context: got {shares} shares behind a sliding window of {config.sliding_window} "
            "tokens, expected 1: what is seen of the past is short"
        )
    if shares > 1 and layout.STRIPE % config.block:
        raise ValueError(
            f"block: got {config.block} tokens with {shares} context shares, expected a divisor of "
            f"the {layout.STRIPE} tokens of a stripe"
        )
    heads, allocation = config.num_kv_heads // tensor, config.allocation
    if allocation is not None:
        order, layers = head_order(config, mesh)[:, :heads], allocation.layers
        own = [
            pairs if len(pairs) == 1 else [pairs[head] for head in first]
            for pairs, first in zip(layers, order, strict=True)
        ]
        keys, values = (
            tuple(
                pairs[0][side] if len(pairs) == 1 else tuple(pair[side] for pair in pairs)
                for pairs in own
            )
            for side in (0, 1)
        )
        allocation = Allocation(keys, values)
    return replace(config, num_kv_heads=heads, allocation=allocation)


def head_order(config: CacheConfig, mesh: Mesh | AbstractMesh) -> Int[np.ndarray, "layers K"]:
    """Of each shard, one after the other, its heads in the order of their formats.

    Heads are numbered within their shard; one shard has them as they are.

    Raises:
      ValueError: shards that would not hold as many heads of each format.
    """
    tensor, found = mesh.shape[TENSOR], []
    if tensor == 1:
        every = np.arange(config.num_kv_heads, dtype=np.int32)
        return np.tile(every, (config.num_layers, 1))
    for layer, place in enumerate(config.places):
        formats = np.resize(place, (tensor, config.num_kv_heads // tensor))
        counted = [np.bincount(own, minlength=len(config.formats)).tolist() for own in formats]
        if any(count != counted[0] for count in counted):
            raise ValueError(
                f"layer {layer}: got {counted} heads of each format on {tensor} shards, expected "
                f"every shard to hold as many of each: `calibrate --tensor {tensor}` finds such, "
                "and so does --preset beside --calibration and --mesh"
            )
        found.append(np.argsort(formats, axis=1, kind="stable").ravel())
    return np.stack(found).astype(np.int32)


def order_here(
    config: CacheConfig, mesh: Mesh, layer: Any = slice(None)
) -> Int[Array, "*layers K"] | None:
    """On a shard, its part of `head_order` for these layers; None where heads stay as they are."""
    if mesh.shape[TENSOR] == 1 or max(map(len, config.places)) == 1:
        return None
    order = head_order(config, mesh).reshape(config.num_layers, mesh.shape[TENSOR], -1)
    return jnp.asarray(order[layer])[..., lax.axis_index(TENSOR), :]


def by_format(
    x: Shaped[Array, "..."], order: Int[Array, "*layers K"] | None, axis: int
) -> Shaped[Array, "..."]:
    """Heads, an axis of a layer, in such an order: of one layer, or of [layers, ...]."""
    if order is None:
        return x
    if order.ndim == 2:
        return jax.vmap(partial(by_format, axis=axis))(x, order)
    return jnp.take(x, order, axis=axis)
