"""Exact bytes: of a cache that exists, and of one that might.

Nothing here is an estimate. What a cache would take is read off the shapes that `create` would
allocate, and what a token costs is what the whole cache costs, everything counted, over its tokens.
"""

from dataclasses import dataclass, fields

import jax

from turboquant_jax.cache import mixed, state
from turboquant_jax.cache.allocation import Allocation
from turboquant_jax.cache.config import CacheConfig
from turboquant_jax.cache.mixed import MixedCache
from turboquant_jax.cache.state import Cache, nbytes_of


@dataclass(frozen=True)
class Bytes:
    """Bytes of a cache by part; `total` is the sum over every array of its pytree."""

    key_codes: int
    value_codes: int
    scales: int
    window: int
    sinks: int
    key_mean: int
    tables: int
    codecs: int

    @property
    def total(self) -> int:
        """Every byte of the cache."""
        return sum(getattr(self, part.name) for part in fields(self))


def count_bytes(cache: Cache | MixedCache) -> Bytes:
    """Bytes by part of a cache, or of the shapes of one."""
    parts = cache.parts if isinstance(cache, MixedCache) else (cache,)
    return Bytes(
        key_codes=nbytes_of([part.pool.keys for part in parts]),
        value_codes=nbytes_of([part.pool.values for part in parts]),
        scales=nbytes_of([part.pool.scales for part in parts]),
        window=nbytes_of([part.window for part in parts]),
        sinks=nbytes_of([part.sinks for part in parts]),
        key_mean=nbytes_of([part.key_mean for part in parts]),
        tables=nbytes_of(
            (
                cache.page_table,
                cache.pending_pages,
                cache.references,
                cache.lengths,
                cache.pending,
                cache.overflow,
            )
        ),
        codecs=nbytes_of([part.codecs for part in parts]),
    )


def planned_bytes(
    config: CacheConfig, batch: int, capacity: int, allocation: Allocation | None = None
) -> Bytes:
    """Bytes of the dense cache that `create` would allocate; no device is touched.

    Of `mixed.create`, where there is an allocation. Without an order of channels, which adds
    `4 layers K H` bytes where the bits of a vector are mixed.
    """

    def make() -> Cache | MixedCache:
        key = jax.random.key(0)
        if allocation is None:
            return state.create(config, batch, capacity, key=key)
        return mixed.create(config, allocation, batch, capacity, key=key)

    return count_bytes(jax.eval_shape(make))


def exact_bytes_per_token(config: CacheConfig) -> int:
    """Bytes of a token, all layers, keys and values, in full precision at `config.dtype`."""
    itemsize = jax.numpy.dtype(config.dtype).itemsize
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize


def bytes_per_compressed_token(config: CacheConfig, allocation: Allocation | None = None) -> float:
    """Bytes of one more token in a long sequence: codes, scales and its share of the page table.

    Exact: the difference of one block more, over the tokens of a block. 0 in a sliding window,
    whose ring of blocks is full.
    """
    edge = config.sinks + config.window + (config.sliding_window or 0)
    fewer, more = (
        planned_bytes(config, 1, edge + blocks * config.block, allocation).total
        for blocks in (8, 9)
    )
    return (more - fewer) / config.block
