"""Exact bytes: of a cache that exists, and of one that might.

Nothing here is an estimate. What a cache would take is read off the shapes that `create` would
allocate, and what a token costs is what the whole cache costs, everything counted, over its tokens.
"""

from dataclasses import dataclass, fields

import jax

from turboquant_jax.cache import calibration, state
from turboquant_jax.cache.config import CacheConfig
from turboquant_jax.cache.state import Cache, nbytes_of


@dataclass(frozen=True)
class Bytes:
    """Bytes of a cache by part; `total` is the sum over every array of its pytree.

    The signs of a sketch are codes of the keys, its norms scales. The window counts the scratch of
    proposed tokens, where there is one.
    """

    key_codes: int
    value_codes: int
    scales: int
    window: int
    sinks: int
    key_mean: int
    phases: int
    tables: int
    codecs: int

    @property
    def total(self) -> int:
        """Every byte of the cache."""
        return sum(getattr(self, part.name) for part in fields(self))


def count_bytes(cache: Cache) -> Bytes:
    """Bytes by part of a cache, or of the shapes of one."""
    pools = [(part.pool, part.pool.sketches) for part in cache.parts]
    return Bytes(
        key_codes=nbytes_of([(pool.keys, sketch and sketch.signs) for pool, sketch in pools]),
        value_codes=nbytes_of([pool.values for pool, _ in pools]),
        scales=nbytes_of(
            [(pool.scales, pool.bases, sketch and sketch.norms) for pool, sketch in pools]
        ),
        window=nbytes_of((cache.window, cache.scratch)),
        sinks=nbytes_of(cache.sinks),
        key_mean=nbytes_of(cache.key_mean),
        phases=nbytes_of(cache.phases),
        tables=nbytes_of(cache.tables),
        codecs=nbytes_of([part.codecs for part in cache.parts]),
    )


def planned_bytes(config: CacheConfig, batch: int, capacity: int) -> Bytes:
    """Bytes of the dense cache that `create` would allocate; no device is touched.

    Without an order of channels, which adds `4 layers K H` bytes where the bits of a vector are
    mixed. Calibrated codecs are counted with their matrices.
    """
    sizes = config.num_layers, config.num_kv_heads, config.head_dim
    codecs = (codec for form in config.formats for codec in (form.key, form.value))
    joint = any(codec.scales != "group" for codec in codecs)

    def make() -> Cache:
        known = calibration.identity(*sizes) if joint else None
        return state.create(config, batch, capacity, key=jax.random.key(0), calibration=known)

    return count_bytes(jax.eval_shape(make))


def exact_bytes_per_token(config: CacheConfig) -> int:
    """Bytes of a token, all layers, keys and values, in full precision at `config.dtype`."""
    itemsize = jax.numpy.dtype(config.dtype).itemsize
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize


def bytes_per_compressed_token(config: CacheConfig) -> float:
    """Bytes of one more token in a long sequence: codes, scales and its share of the page table.

    Exact: the difference of one block more, over the tokens of a block, but for the angles of RoPE,
    a row for 4,096 tokens. 0 in a sliding window, whose ring of blocks is full.
    """
    edge = config.sinks + config.window + (config.sliding_window or 0)
    counted = (planned_bytes(config, 1, edge + blocks * config.block) for blocks in (8, 9))
    fewer, more = (found.total - found.phases for found in counted)
    return (more - fewer) / config.block


def compression_ratio(
    config: CacheConfig, tokens: int, batch: int = 1, *, codecs: bool = True
) -> float:
    """How many times the bytes of full precision are those of a dense cache for so many tokens.

    Everything is counted: codes, scales, window, sinks, means, tables, rotations. `codecs=False`
    leaves out rotations and calibrated matrices, which are there once for any number of caches.
    """
    full = batch * tokens * exact_bytes_per_token(config)
    planned = planned_bytes(config, batch, tokens)
    return full / (planned.total - (0 if codecs else planned.codecs))
