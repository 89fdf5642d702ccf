"""A cache whose layers have bits of their own.

The layers of equal codecs are a *part*, an ordinary `Cache`. What does not depend on the layer, the
lengths and the page table, is stored once for all parts: they share every block, window and sink,
so that it would be the same. The functions are those of `cache`, and attention goes

    part, index = mixed.select(cache, layer)              # an ordinary cache and a layer of it
    output, part = attend_and_write(part, index, q, k, v)
    cache = mixed.update(cache, layer, part)

with a layer that is known when the program is traced: layers that differ cannot be scanned.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass
from jaxtyping import Array, Bool, Float, Int

from turboquant_jax.cache import appending, sharing, state
from turboquant_jax.cache.allocation import Allocation
from turboquant_jax.cache.appending import Implementation
from turboquant_jax.cache.config import CacheConfig, CodecConfig
from turboquant_jax.cache.state import Cache

Places = tuple[tuple[int, int], ...]

_SHARED = ("lengths", "pending", "overflow", "page_table", "pending_pages", "references")


@register_dataclass
@dataclass(frozen=True, repr=False)
class MixedCache:
    """The cache of all layers for B sequences, in parts. Immutable; see `Cache`.

    Attributes:
      places: of every layer, its part and its place among the layers of that part.
      parts: caches of some layers each, all else alike. What is shared is not in them: `select`.
      lengths, pending, overflow, page_table, pending_pages, references: as those of `Cache`.
    """

    places: Places = field(metadata={"static": True})
    parts: tuple[Cache, ...]
    lengths: Int[Array, " B"]
    pending: Int[Array, " B"]
    overflow: Bool[Array, " B"]
    page_table: Int[Array, "B slots"]
    pending_pages: Int[Array, "B slots"]
    references: Int[Array, " pages"]

    @property
    def configs(self) -> tuple[CacheConfig, ...]:
        """Of every layer."""
        return tuple(self.parts[part].config for part, _ in self.places)

    @property
    def nbytes(self) -> int:
        """Bytes of every array of the pytree."""
        return state.nbytes_of(self)

    def __repr__(self) -> str:
        keys, values = (
            ", ".join(str(getattr(config, name).bits) for config in self.configs)
            for name in ("key", "value")
        )
        size = ""  # see `Cache.__repr__`
        if all(hasattr(leaf, "size") for leaf in jax.tree.leaves(self)):
            size = f", nbytes={self.nbytes:,}"
        return (
            f"MixedCache(parts={len(self.parts)}, keys=[{keys}] bits, values=[{values}] bits{size})"
        )


def create(
    config: CacheConfig,
    allocation: Allocation,
    batch: int,
    capacity: int,
    *,
    key: Array,
    num_pages: int | None = None,
) -> MixedCache:
    """An empty cache of these bits.

    A layer is exactly what it would be in `cache.create` of the same key with its bits in all
    layers: the rotations are shared by all layers here too.

    Args:
      config: everything but the bits, which are the allocation's.
      allocation: bits of every layer.
      batch, capacity, key, num_pages: see `cache.create`.

    Raises:
      ValueError: bits for another number of layers, and what `cache.create` refuses.
    """
    configs, places = split(config, allocation)
    parts = [state.create(c, batch, capacity, key=key, num_pages=num_pages) for c in configs]
    return join(parts, places)


def split(config: CacheConfig, allocation: Allocation) -> tuple[tuple[CacheConfig, ...], Places]:
    """Configurations of the parts, in the order in which layers meet them, and every layer's place.

    Raises:
      ValueError: bits for another number of layers.
    """
    if len(allocation.layers) != config.num_layers:
        raise ValueError(
            f"an allocation must have bits for {config.num_layers} layers, "
            f"got {len(allocation.layers)}"
        )
    members: dict[tuple[int, int], int] = {}
    kinds, places = list(dict.fromkeys(allocation.layers)), []
    for bits in allocation.layers:
        places.append((kinds.index(bits), members.setdefault(bits, 0)))
        members[bits] += 1
    configs = (
        replace(
            config,
            num_layers=members[key, value],
            key=replace(config.key, bits=key),
            value=replace(config.value, bits=value),
        )
        for key, value in kinds
    )
    return tuple(configs), tuple(places)


def join(parts: Sequence[Cache], places: Places) -> MixedCache:
    """Caches of some layers each as one; lengths and page tables are those of the first.

    Raises:
      ValueError: caches that differ in more than layers and codecs.
    """
    alike = {_beside_codecs(part) for part in parts}
    if len(alike) != 1:
        raise ValueError(f"parts must differ in layers and codecs alone, got {alike}")
    return MixedCache(places, tuple(map(_without_shared, parts)), **_shared(parts[0]))


def select(cache: MixedCache, layer: int | Int[Array, ""]) -> tuple[Cache, int]:
    """The part that has a layer, whole, and the number of the layer in it.

    Raises:
      ValueError: no such layer, or one that is not known while tracing.
    """
    part, index = cache.places[_number(cache, layer)]
    return _whole(cache, part), index


def update(cache: MixedCache, layer: int | Int[Array, ""], part: Cache) -> MixedCache:
    """The cache with another state of the part that `select` gave, between begin and commit."""
    where, _ = cache.places[_number(cache, layer)]
    parts = list(cache.parts)
    parts[where] = _without_shared(part)
    return replace(cache, parts=tuple(parts))


def begin(cache: MixedCache, counts: Int[Array, " B"], most: int) -> MixedCache:
    """See `cache.begin`."""
    return replace(cache, **_shared(appending.begin(_whole(cache, 0), counts, most)))


def write(
    cache: MixedCache,
    layer: int | Int[Array, ""],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    implementation: Implementation | None = None,
) -> MixedCache:
    """See `cache.write`; the layer as in `select`."""
    part, index = select(cache, layer)
    return update(cache, layer, appending.write(part, index, k, v, implementation=implementation))


def commit(cache: MixedCache, *, implementation: Implementation | None = None) -> MixedCache:
    """See `cache.commit`."""
    return _of(
        cache, [appending.commit(part, implementation=implementation) for part in _wholes(cache)]
    )


def append(
    cache: MixedCache,
    k: Float[Array, "layers B T K H"],
    v: Float[Array, "layers B T K H"],
    counts: Int[Array, " B"] | None = None,
) -> MixedCache:
    """See `cache.append`."""
    layers = len(cache.places)
    if k.ndim != 5 or k.shape[0] != layers or k.shape != v.shape:
        raise ValueError(
            f"keys and values must be [{layers} layers, B, T, K, H], got {k.shape} and {v.shape}"
        )
    parts = []
    for i, part in enumerate(_wholes(cache)):
        own = jnp.asarray([n for n, (where, _) in enumerate(cache.places) if where == i])
        parts.append(appending.append(part, k[own], v[own], counts))
    return _of(cache, parts)


def fork(
    cache: MixedCache, source: Int[Array, ""] | int, target: Int[Array, ""] | int
) -> MixedCache:
    """See `cache.fork`."""
    return _of(cache, [sharing.fork(part, source, target) for part in _wholes(cache)])


def free(cache: MixedCache, rows: Bool[Array, " B"]) -> MixedCache:
    """See `cache.free`."""
    return replace(cache, **_shared(sharing.free(_whole(cache, 0), rows)))


def _number(cache: MixedCache, layer: int | Int[Array, ""]) -> int:
    try:
        number = operator.index(layer)
    except TypeError as error:
        raise ValueError(
            f"the layer of a mixed cache must be known while tracing, got {layer}: layers that "
            "differ cannot be scanned, unstack the decoder"
        ) from error
    if not 0 <= number < len(cache.places):
        raise ValueError(f"layer must be between 0 and {len(cache.places) - 1}, got {number}")
    return number


def _beside_codecs(part: Cache) -> tuple:
    alike = replace(part.config, num_layers=1, key=CodecConfig(), value=CodecConfig())
    return alike, part.capacity, part.page_table.shape, part.references.shape


def _shared(part: Cache) -> dict[str, Any]:
    return {name: getattr(part, name) for name in _SHARED}


def _without_shared(part: Cache) -> Cache:
    nothing: dict[str, Any] = dict.fromkeys(_SHARED)
    return replace(part, **nothing)


def _whole(cache: MixedCache, part: int) -> Cache:
    return replace(cache.parts[part], **{name: getattr(cache, name) for name in _SHARED})


def _wholes(cache: MixedCache) -> list[Cache]:
    return [_whole(cache, part) for part in range(len(cache.parts))]


def _of(cache: MixedCache, parts: Sequence[Cache]) -> MixedCache:
    """After the same was done to all parts."""
    return replace(cache, parts=tuple(map(_without_shared, parts)), **_shared(parts[0]))
