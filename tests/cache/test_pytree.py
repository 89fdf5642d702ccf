"""The cache as a citizen of JAX: transformations, donation, shardings, and how it prints."""

from dataclasses import FrozenInstanceError, fields
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.layout import QUICK
from turboquant_jax import cache
from turboquant_jax.attention import attend

CONFIG = cache.CacheConfig(
    2, 1, 8, cache.CodecConfig(2), cache.CodecConfig(1), block=8, window=5, sinks=1
)
BATCH, CAPACITY = 3, 9000


@partial(jax.jit, static_argnums=0)
def make(capacity=CAPACITY):
    return cache.create(CONFIG, BATCH, capacity, key=jax.random.key(0))


def tokens(count, seed=0):
    rng = np.random.default_rng(seed)
    shape = (2, CONFIG.num_layers, BATCH, count, 1, 8)
    return [jnp.asarray(x) for x in rng.normal(0, 1, shape).astype(np.float32)]


@pytest.fixture(scope="module")
def donated_append():
    shapes = jax.eval_shape(make)
    k = jax.ShapeDtypeStruct((2, BATCH, 1, 1, 8), jnp.float32)
    counts = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    return jax.jit(cache.append, donate_argnums=0).lower(shapes, k, k, counts).compile()


def fresh_bytes(compiled):
    """Bytes that a call allocates: its temporaries, and outputs that are not donated inputs."""
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def test_a_donated_append_allocates_nothing_of_the_size_of_the_cache(donated_append):
    state = jax.eval_shape(make)
    table = state.table.page_table.size * 4
    assert state.nbytes > 300_000
    # a few copies of the page table and of the reference counts are all; 2 ints a page of 96 bytes
    assert fresh_bytes(donated_append) < 8 * table
    assert fresh_bytes(donated_append) < 0.4 * jax.tree.reduce(
        lambda total, x: total + x.size * x.dtype.itemsize, state.parts[0].pool, 0
    )


def test_a_donated_append_is_in_place(donated_append):
    state = make()
    k, v = tokens(40)
    before = [
        leaf.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves((state.parts[0].pool, state.window))
    ]
    old = state
    for i in range(40):  # blocks are compressed at different steps of different rows
        counts = jnp.asarray([1, i % 2, int(i < 20)], jnp.int32)
        state = donated_append(state, k[:, :, i : i + 1], v[:, :, i : i + 1], counts)
    after = [
        leaf.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves((state.parts[0].pool, state.window))
    ]
    assert before == after
    assert state.lengths.tolist() == [40, 20, 20]
    assert old.parts[0].pool.scales[0].is_deleted()


@pytest.mark.parametrize("loop", ["scan", "while_loop"])
def test_appending_in_a_loop_is_in_place_too(loop):
    def decode(state, k, v):
        if loop == "scan":
            xs = (jnp.moveaxis(k, 2, 0)[:, :, :, None], jnp.moveaxis(v, 2, 0)[:, :, :, None])
            return jax.lax.scan(lambda s, x: (cache.append(s, *x), None), state, xs)[0]
        return jax.lax.while_loop(
            lambda s: jnp.max(s.lengths) < 50,
            lambda s: cache.append(s, k[:, :, :1], v[:, :, :1]),
            state,
        )

    shapes = jax.eval_shape(make)
    k = jax.ShapeDtypeStruct((2, BATCH, 50, 1, 8), jnp.float32)
    compiled = jax.jit(decode, donate_argnums=0).lower(shapes, k, k).compile()
    assert fresh_bytes(compiled) < 10 * shapes.table.page_table.size * 4
    assert not [
        line
        for line in compiled.as_text().splitlines()
        for leaf in jax.tree.leaves(shapes.parts[0].pool)
        if " copy(" in line and f"[{','.join(map(str, leaf.shape))}]" in line.split(" copy(")[0]
    ], "XLA copies the pool"


def test_one_compilation_serves_a_ragged_decode():
    @partial(jax.jit, compiler_options=QUICK)
    @chex.assert_max_traces(n=1)
    def step(state, q, k, v, counts):
        out = attend(state, 0, q, k[0], v[0])
        return cache.append(state, k, v, counts), out

    state, rng = make(capacity=210), np.random.default_rng(1)
    k, v = tokens(200)
    q = jnp.ones((BATCH, 1, 2, 8))
    total = np.zeros(BATCH, int)
    for i in range(200):
        counts = rng.random(BATCH) < [1, 0.7, 0.3]
        total += counts
        state, out = step(
            state, q, k[:, :, i : i + 1], v[:, :, i : i + 1], jnp.asarray(counts, jnp.int32)
        )
        assert np.isfinite(out).all()
    assert state.lengths.tolist() == total.tolist()
    assert len(set(CONFIG.num_blocks(total).tolist())) == 3, "rows compress at different steps"


def test_vmap_over_caches():
    """Two caches with other contents and lengths, stacked, as a loop over them."""
    append = cache.append
    states = [make(capacity=30) for _ in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    looped = jax.jit(append, compiler_options=QUICK)
    batched = jax.jit(jax.vmap(append), compiler_options=QUICK)
    pairs = [tokens(1, seed) for seed in (1, 2)]
    k, v = (jnp.stack([pair[i] for pair in pairs]) for i in (0, 1))
    counts = jnp.asarray([[1, 1, 0], [1, 0, 1]])
    for _ in range(16):
        states = [looped(s, *pair, n) for s, pair, n in zip(states, pairs, counts, strict=True)]
        stacked = batched(stacked, k, v, counts)
    chex.assert_trees_all_equal(stacked, jax.tree.map(lambda *x: jnp.stack(x), *states))
    assert CONFIG.num_blocks(16) == 1


def test_shapes_without_arrays():
    shapes = jax.eval_shape(make)
    k = jax.ShapeDtypeStruct((2, BATCH, 1, 1, 8), jnp.float32)
    after = jax.eval_shape(cache.append, shapes, k, k)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, shapes)


def test_it_prints_a_summary():
    text = repr(make())
    assert text.startswith("Cache(layers=2, capacity=9000, kv_heads=1, head_dim=8")
    assert "key=2 bits, value=1 bits" in text and "batch=3" in text and len(text) < 250
    assert f"nbytes={make().nbytes:,}" in text
    # JAX rebuilds pytrees with anything in place of the arrays
    assert repr(jax.tree.map(lambda x: None, make(20))).startswith("Cache(")
    assert repr(jax.tree.map(lambda x: jax.P(), make(20))).startswith("Cache(")


def test_it_is_frozen():
    state = make(20)
    for field in fields(state):
        with pytest.raises(FrozenInstanceError):
            setattr(state, field.name, None)
    doubled = jax.tree.map(lambda x: x, state)
    assert doubled.config is state.config and doubled.capacity == state.capacity


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(batch=0), "got 0, 30 and 0, expected positive"),
        (dict(capacity=0), "expected positive"),
        (dict(num_pages=0), "expected positive"),
        (dict(key_order=np.zeros((1, 1, 8), np.int32)), r"got \(1, 1, 8\), expected \(2, 1, 8\)"),
    ],
)
def test_caches_that_cannot_be(arguments, says):
    with pytest.raises(ValueError, match=says):
        cache.create(CONFIG, **dict(batch=1, capacity=30) | arguments, key=jax.random.key(0))


def test_keys_and_values_of_other_shapes_are_refused():
    state = jax.eval_shape(lambda: make(30))

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    for k, v, says in [
        (shape(1, BATCH, 1, 1, 8), shape(1, BATCH, 1, 1, 8), r"expected \[2 layers"),
        (shape(2, BATCH, 1, 1, 8), shape(2, BATCH, 2, 1, 8), r"expected \[2 layers"),
        (shape(2, BATCH, 1, 1, 9), shape(2, BATCH, 1, 1, 9), r"expected \(3, 1, 1, 8\)"),
    ]:
        with pytest.raises(ValueError, match=says):
            jax.eval_shape(cache.append, state, k, v)
