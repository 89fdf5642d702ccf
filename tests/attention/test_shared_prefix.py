"""Blocks that all sequences share, read once for the queries of all of them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import schedule
from pallas_kernels.primitives.triton import interpreted
from tests.attention.test_fused import COMPILED, SHAPE, random_cache
from tests.marks import GPU
from turboquant_jax import cache
from turboquant_jax.attention import attend, attend_and_write

SHARED = 5  # blocks
NAMES = ("centred", "centred before RoPE", "heads of several bits", "values in full precision")


def forked(config, rng):
    """Three sequences that begin alike, of which one has nothing but what they share."""
    state = random_cache(config, rng)
    table = np.array(state.table.page_table)
    table[:, :SHARED] = table[0, :SHARED]
    if state.key_mean is not None:
        state = replace(state, key_mean=state.key_mean.at[:].set(state.key_mean[:, :1]))
    least = config.sinks + SHARED * config.block + config.window
    return state.with_table(
        page_table=jnp.asarray(table),
        lengths=jnp.asarray([396, least, least + config.block + 3], jnp.int32),
        pending=jnp.ones(3, jnp.int32),
    )


@pytest.mark.parametrize(
    ("name", "count", "interpret"),
    [
        *((name, 1, True) for name in NAMES[:2]),
        (NAMES[2], 3, True),
        *(pytest.param(name, count, False, marks=GPU) for name in NAMES for count in (1, 4)),
    ],
)
def test_shared_blocks_are_attended_to_as_any(name, count, interpret, monkeypatch):
    """By the definition, and by the kernel, which has them as those of one sequence."""
    monkeypatch.setattr(schedule, "MIN_TILES", 1)
    config = cache.CacheConfig(**SHAPE | COMPILED[name])
    rng = np.random.default_rng(8)
    state, heads = forked(config, rng), config.num_kv_heads
    assert cache.shared_blocks(state) == SHARED
    q, k, v = (
        jnp.asarray(rng.normal(0, 1, (3, count, n, config.head_dim)), jnp.float32)
        for n in (3 * heads, heads, heads)
    )
    options = dict(sink_logits=jnp.asarray(rng.normal(0, 1, 3 * heads), jnp.float32))

    @jax.jit
    def all_ways(state, q, k, v):
        with jax.default_matmul_precision("highest"):
            want = attend(state, 1, q, k, v, **options, implementation="xla")
            shared = options | dict(shared_blocks=SHARED)
            defined = attend(state, 1, q, k, v, **shared, implementation="xla")
        if count > 1:
            got = attend(state, 1, q, k, v, **shared, implementation="pallas")
            return want, defined, got, state
        return (
            want,
            defined,
            *attend_and_write(state, 1, q, k, v, **shared, implementation="pallas"),
        )

    with interpreted(interpret):
        want, defined, got, written = all_ways(state, q, k, v)
    assert np.isfinite(want).all()
    np.testing.assert_allclose(defined, want, rtol=1e-4, atol=1e-5)
    for row in range(3):
        assert np.linalg.norm((got - want)[row]) <= 2e-3 * np.linalg.norm(want[row])
    if count == 1:
        definition = cache.write(state, 1, k, v, implementation="xla")
        jax.tree.map(np.testing.assert_array_equal, written, definition)


def test_what_is_shared_is_read_off_the_pages():
    config = cache.CacheConfig(**SHAPE | COMPILED["centred"])
    state = cache.create(config, 3, 400, key=jax.random.key(0))
    assert cache.shared_blocks(state) == 0
    k, v = jax.random.normal(jax.random.key(1), (2, 2, 3, 100, 2, 32))
    state = cache.append(state, k, v, jnp.asarray([100, 0, 0]))
    assert cache.shared_blocks(state) == 0
    state = cache.fork(cache.fork(state, 0, 1), 0, 2)
    blocks = int(config.num_blocks(100))
    assert cache.shared_blocks(state) == blocks > 0
    state = cache.append(state, k[:, :, :, :60], v[:, :, :, :60])  # blocks of their own
    assert cache.shared_blocks(state) == blocks
    assert cache.shared_blocks(cache.free(state, jnp.asarray([False, False, True]))) == 0


@pytest.mark.parametrize(("change", "blocks"), [({}, -1), ({}, 13), (dict(sliding_window=100), 1)])
def test_blocks_that_cannot_be_shared_are_refused(change, blocks):
    config = cache.CacheConfig(**SHAPE | COMPILED["centred"] | change)
    state = jax.eval_shape(lambda: cache.create(config, 3, 400, key=jax.random.key(0)))
    q, k = (jnp.zeros((3, 1, n, 32)) for n in (4, 2))
    with pytest.raises(ValueError, match=f"shared_blocks: got {blocks}, expected 0 to"):
        attend(state, 0, q, k, k, shared_blocks=blocks)
