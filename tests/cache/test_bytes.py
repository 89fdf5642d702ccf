"""Planned bytes are the bytes of a cache that is really allocated, part by part."""

import doctest
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from turboquant_jax import cache
from turboquant_jax.cache.bytes import (
    bytes_per_compressed_token,
    count_bytes,
    exact_bytes_per_token,
    planned_bytes,
)

CODEC = cache.CodecConfig
CONFIGS = {
    "default": cache.CacheConfig(2, 3, 64),
    "uneven": cache.CacheConfig(3, 1, 16, CODEC(3), CODEC(5), block=8, window=5, sinks=0),
    "trellis": cache.CacheConfig(1, 2, 32, CODEC(2, code="trellis"), CODEC(1), window=0),
    "outliers": cache.CacheConfig(
        1, 1, 128, CODEC(((32, 3), (96, 2)), "haar"), CODEC(4), center_keys=False
    ),
    "local": cache.CacheConfig(2, 1, 16, CODEC(4), CODEC(4), block=16, window=8, sliding_window=50),
    "prod": cache.CacheConfig(2, 2, 40, CODEC(3, "haar", code="prod"), CODEC(2, "haar"), window=8),
    "short scales": cache.CacheConfig(
        2, 2, 64, CODEC(((16, 4), (48, 1)), "haar"), CODEC(2), scale_bits=8
    ),
    "short scales of one side": cache.CacheConfig(2, 2, 32, CODEC(16), CODEC(4), scale_bits=8),
    "keys in full precision": cache.CacheConfig(2, 3, 64, CODEC(16), CODEC(3)),
    "values in full precision": cache.CacheConfig(2, 2, 32, CODEC(4), CODEC(16), window=8),
    "float32": cache.CacheConfig(1, 1, 8, block=8, window=16, dtype="float32"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_planned_is_allocated(name):
    config = CONFIGS[name]
    state = jax.jit(partial(cache.create, config, 2, 517, key=jax.random.key(0)))()
    planned = planned_bytes(config, 2, 517)
    assert planned == count_bytes(state)
    assert planned.total == state.nbytes
    leaves = jax.tree.leaves(state)
    assert planned.total == sum(np.asarray(leaf).nbytes for leaf in leaves)
    assert planned.total == sum(x.on_device_size_in_bytes() for x in leaves), "the device's word"


def by_hand(config, capacity):
    """The parts of one sequence from the documented layout, without a cache."""
    c, layers, heads, dim = config, config.num_layers, config.num_kv_heads, config.head_dim
    pages = (capacity - c.sinks - c.window) // c.block
    vectors = layers * pages * c.block * heads
    sketched = c.key.code == "prod"
    item = {"float32": 4, "bfloat16": 2}[c.dtype]
    return {
        "key_codes": vectors * dim * c.key.bits // 8,
        "value_codes": vectors * dim * c.value.bits // 8,
        "scales": vectors * {16: 2}.get(max(c.key.bits, c.value.bits), 4 + 2 * sketched),
        "window": 2 * layers * (c.window + c.block) * heads * dim * item,
        "sinks": 2 * layers * c.sinks * heads * dim * item,
        "key_mean": 0 if c.key.bits == 16 else layers * heads * dim * 4,
        "tables": 12 * pages + 4 + 4 + 1,
    }


@pytest.mark.parametrize(
    "name",
    ["default", "uneven", "prod", "keys in full precision", "values in full precision", "float32"],
)
def test_the_parts_are_what_the_layout_says(name):
    config = CONFIGS[name]
    planned = planned_bytes(config, 1, 1000)
    for part, count in by_hand(config, 1000).items():
        assert getattr(planned, part) == count, part


def test_bytes_of_a_further_token():
    """d = 128, 4 bits: 2 (64 + 2) bytes a head against 2 * 256; and 12 bytes of tables a block."""
    config = cache.CacheConfig(32, 8, 128)
    assert exact_bytes_per_token(config) == 32 * 8 * 2 * 256
    assert bytes_per_compressed_token(config) == 32 * 8 * 2 * 66 + 12 / 64
    sketched = replace(config, key=CODEC(4, code="prod"))  # a norm more, the signs are a bit of 4
    assert bytes_per_compressed_token(sketched) == 32 * 8 * (66 + 68) + 12 / 64
    for sides in (dict(key=CODEC(16)), dict(value=CODEC(16))):  # one scale, of the other side
        assert bytes_per_compressed_token(replace(config, **sides)) == 32 * 8 * (256 + 66) + 12 / 64
    short = replace(config, scale_bits=8)  # a byte a vector, and 2 of its base a page
    assert bytes_per_compressed_token(short) == 32 * 8 * 2 * (65 + 2 / 64) + 12 / 64
    ring = cache.CacheConfig(32, 8, 128, sliding_window=4096)
    assert bytes_per_compressed_token(ring) == 0


def test_the_bytes_of_a_sliding_window_stop_growing():
    sizes = [planned_bytes(CONFIGS["local"], 2, n).total for n in (20, 50, 80, 10**3, 10**6)]
    assert sizes[0] < sizes[1] < sizes[2] == sizes[3] == sizes[4]


def test_the_numbers_in_the_documentation():
    path = Path(__file__).parents[2] / "docs" / "cache.md"
    failed, tried = doctest.testfile(str(path), module_relative=False)
    assert tried > 3 and not failed
