"""A cache whose layers have bits of their own: layer by layer that of uniform bits."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.layout import QUICK
from turboquant_jax import cache
from turboquant_jax.attention import attend, attend_and_write
from turboquant_jax.cache import Allocation, CodecConfig, mixed
from turboquant_jax.cache.accounting import (
    bytes_per_compressed_token,
    count_bytes,
    planned_bytes,
)
from turboquant_jax.cache.storage import restore, save

ALLOCATION = Allocation((3, 1, 3), (2, 4, 2))  # two parts, of two layers and of one
LAYERS = 3
CONFIG = cache.CacheConfig(
    LAYERS, 2, 8, CodecConfig(8, "haar"), CodecConfig(8), block=8, window=5, sinks=2
)
BATCH, CAPACITY = 3, 44
COUNTS = [([20, 7, 0], 20), ([1, 1, 1], 1), ([11, 20, 3], 20), *[([1, 1, 0], 1)] * 9]


def empty(allocation=ALLOCATION, config=CONFIG, **options):
    return mixed.create(config, allocation, BATCH, CAPACITY, key=jax.random.key(1), **options)


def uniform(layer, **options):
    key, value = ALLOCATION.layers[layer]
    config = replace(
        CONFIG, key=replace(CONFIG.key, bits=key), value=replace(CONFIG.value, bits=value)
    )
    return cache.create(config, BATCH, CAPACITY, key=jax.random.key(1), **options)


def tokens(most, seed):
    shape = (LAYERS, BATCH, most, 2, 8)
    k, v = np.random.default_rng(seed).normal(1, 1, (2, *shape)).astype(np.float32)
    q = (
        np.random.default_rng(seed + 99)
        .normal(0, 1, (LAYERS, BATCH, most, 4, 8))
        .astype(np.float32)
    )
    return map(jnp.asarray, (q, k, v))


one_layer = jax.jit(attend_and_write)  # compiled apart, so that layers alike are lowered once


@partial(jax.jit, donate_argnums=0, compiler_options=QUICK)
def step(state, q, k, v, counts):
    """A pass through all layers, as a decoder makes it."""
    state, outputs = mixed.begin(state, counts, q.shape[2]), []
    for layer in range(LAYERS):
        part, index = mixed.select(state, layer)
        output, part = one_layer(part, jnp.int32(index), q[layer], k[layer], v[layer])
        state = mixed.update(state, layer, part)
        outputs.append(output)
    return mixed.commit(state), outputs


@partial(jax.jit, compiler_options=QUICK)
def uniform_step(state, layer, q, k, v, counts):
    """Of an ordinary cache only this layer is filled."""
    state = cache.begin(state, counts, q.shape[2])
    output, state = attend_and_write(state, layer, q[layer], k[layer], v[layer])
    return cache.commit(state), output


def layer_of(state, layer):
    """Everything that a cache holds of a layer."""
    held = state.pool, state.sinks, state.window, state.key_mean
    return jax.tree.map(lambda x: x[layer], held)


def test_a_layer_is_that_of_uniform_bits_bit_by_bit(same_bits):
    """Ragged chunks and steps, donated; what is shared, and what does not fit, too."""
    state, others = empty(), [uniform(layer) for layer in range(LAYERS)]
    for seed, (counts, most) in enumerate([*COUNTS, ([20, 2, 1], 20)]):
        q, k, v = tokens(most, seed)
        counts = jnp.asarray(counts)
        state, outputs = step(state, q, k, v, counts)
        for layer in range(LAYERS):
            others[layer], expected = uniform_step(others[layer], jnp.int32(layer), q, k, v, counts)
            np.testing.assert_array_equal(outputs[layer], expected)
    assert state.overflow.tolist() == [True, False, False]
    assert CONFIG.num_blocks(np.asarray(state.lengths)).tolist() == [4, 4, 0]
    for layer, expected in enumerate(others):
        part, index = mixed.select(state, layer)
        same_bits(layer_of(part, index), layer_of(expected, layer))
        for name in ("lengths", "overflow", "page_table", "references", "pending", "codecs"):
            same_bits(getattr(part, name), getattr(expected, name))


def test_append_fork_and_free_are_those_of_uniform_bits(same_bits):
    _, k, v = tokens(20, 0)

    def run(state, use):
        append = jax.jit(use.append, compiler_options=QUICK)
        state = append(state, k, v, jnp.asarray([20, 20, 9]))
        state = append(use.fork(state, 0, 2), k, v, jnp.asarray([2, 2, 2]))
        state = use.free(state, jnp.asarray([False, True, False]))
        return append(state, k, v, jnp.asarray([19, 0, 9]))

    state = run(empty(num_pages=7), mixed)
    for layer in (1, 2):
        expected = run(uniform(layer, num_pages=7), cache)
        part, index = mixed.select(state, layer)
        same_bits(layer_of(part, index), layer_of(expected, layer))
        for name in ("lengths", "overflow", "page_table", "references"):
            same_bits(getattr(state, name), getattr(expected, name))
    assert np.asarray(state.references).max() == 2, "a page is shared"
    with pytest.raises(ValueError, match=r"must be \[3 layers, B, T, K, H\], got \(2, "):
        mixed.append(state, k[:2], v[:2])


def test_write_is_write():
    _, k, v = tokens(1, 0)
    begun = mixed.begin(empty(), jnp.ones(BATCH, jnp.int32), 1)
    part, index = mixed.select(mixed.write(begun, 2, k[2], v[2]), 2)
    np.testing.assert_array_equal(part.sinks.keys[index, :, 0], k[2, :, 0].astype(jnp.bfloat16))
    assert not mixed.select(begun, 2)[0].sinks.keys.any()


@pytest.mark.parametrize(
    "config", [CONFIG, cache.CacheConfig(LAYERS, 3, 64), replace(CONFIG, sinks=0)]
)
def test_planned_is_allocated(config):
    state = jax.jit(lambda: mixed.create(config, ALLOCATION, 2, 517, key=jax.random.key(0)))()
    planned = planned_bytes(config, 2, 517, ALLOCATION)
    assert planned == count_bytes(state)
    assert planned.total == state.nbytes == sum(x.nbytes for x in jax.tree.leaves(state))


def test_bytes_are_those_of_uniform_bits_in_the_same_sum():
    """Page tables and windows are there once; a part's signs of 64 channels are not."""
    config = cache.CacheConfig(4, 3, 64, CodecConfig(3), CodecConfig(2))
    allocation = Allocation((4, 2, 1, 5), (2, 2, 3, 1))
    plain, planned = planned_bytes(config, 2, 4000), planned_bytes(config, 2, 4000, allocation)
    assert replace(planned, codecs=plain.codecs) == plain
    assert planned.codecs == 4 * plain.codecs
    assert bytes_per_compressed_token(config, allocation) == bytes_per_compressed_token(config)


def test_a_donated_step_allocates_nothing_of_the_size_of_the_cache():
    make = partial(mixed.create, CONFIG, ALLOCATION, BATCH, 9000, key=jax.random.key(0))
    shapes = jax.eval_shape(make)
    _, k, v = jax.eval_shape(lambda: tuple(tokens(1, 0)))
    counts = jax.ShapeDtypeStruct((BATCH,), jnp.int32)

    def write(state, k, v, counts):
        state = mixed.begin(state, counts, 1)
        for layer in range(LAYERS):
            state = mixed.write(state, layer, k[layer], v[layer])
        return mixed.commit(state)

    compiled = jax.jit(write, donate_argnums=0).lower(shapes, k, v, counts).compile()
    memory = compiled.memory_analysis()
    fresh = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert fresh < 8 * 4 * shapes.page_table.size < shapes.nbytes / 5


def test_it_comes_back_bit_by_bit(tmp_path, same_bits):
    state = empty()
    _, k, v = tokens(20, 0)
    state = jax.jit(mixed.append, compiler_options=QUICK)(state, k, v)
    save(state, tmp_path / "prompt", model="m")
    same_bits(restore(empty(), tmp_path / "prompt", model="m"), state)
    swapped = Allocation((3, 3, 1), (2, 2, 4))  # arrays of the same shapes
    with pytest.raises(ValueError, match="got config"):
        restore(empty(swapped), tmp_path / "prompt", model="m")
    with pytest.raises(ValueError, match="got config"):
        restore(uniform(0), tmp_path / "prompt", model="m")


def test_a_layer_that_is_not_known_while_tracing_is_refused():
    state, (q, k, v) = jax.eval_shape(empty), tokens(1, 0)

    def scanned(state, q, k, v):
        def one(state, layer):
            part, index = mixed.select(state, layer)
            return state, attend(part, index, q[0], k[0], v[0])

        return jax.lax.scan(one, state, jnp.arange(LAYERS))

    with pytest.raises(ValueError, match="must be known while tracing"):
        jax.eval_shape(scanned, state, q, k, v)
    for layer in (3, -1):
        with pytest.raises(ValueError, match=f"between 0 and 2, got {layer}"):
            mixed.select(state, layer)


@pytest.mark.parametrize(
    ("keys", "values", "says"),
    [
        ((), (), "same layers, got 0 and 0"),
        ((3, 2), (3,), "same layers, got 2 and 1"),
        ((3, 9), (3, 3), "between 1 and 8, got 9 for the keys of layer 1"),
        ((3, 3), (0, 3), "between 1 and 8, got 0 for the values of layer 0"),
        ((3, True), (3, 3), "integers between 1 and 8, got True"),
        ((3, 3), (3, 3), "bits for 3 layers, got 2"),
    ],
)
def test_allocations_that_cannot_be(keys, values, says):
    with pytest.raises(ValueError, match=says):
        mixed.split(CONFIG, Allocation(keys, values))


def test_parts_that_differ_in_more_than_bits_are_refused():
    (one, other), places = mixed.split(CONFIG, ALLOCATION)
    other = one, replace(other, window=6)
    parts = [cache.create(c, BATCH, CAPACITY, key=jax.random.key(0)) for c in other]
    with pytest.raises(ValueError, match="layers and codecs alone"):
        mixed.join(parts, places)


def test_it_prints_a_summary():
    assert repr(empty()).startswith(
        "MixedCache(parts=2, keys=[3, 1, 3] bits, values=[2, 4, 2] bits, nbytes="
    )
    assert repr(jax.tree.map(lambda x: None, empty())).startswith("MixedCache(parts=2")
