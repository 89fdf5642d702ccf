"""What the tests of the cache share: small caches, compiled once, and the comparison of two."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from turboquant_jax import cache

BATCH, CAPACITY, MOST = 3, 44, 20
GLOBAL = cache.CacheConfig(
    2, 2, 8, cache.CodecConfig(3), cache.CodecConfig(2), block=8, window=5, sinks=2
)
LOCAL = cache.CacheConfig(
    2, 1, 8, cache.CodecConfig(2), cache.CodecConfig(1), block=8, window=3, sinks=1,
    sliding_window=22, center_keys=False,
)  # fmt: skip


class Compiled:
    """A config, its empty dense cache, tokens to append, and `append` for T = 1 and T = MOST."""

    def __init__(self, config):
        self.config = config
        make = partial(cache.create, config, BATCH, CAPACITY, key=jax.random.key(1))
        self.empty = jax.jit(make)()
        rng = np.random.default_rng(5)
        shape = (config.num_layers, BATCH, CAPACITY, config.num_kv_heads, config.head_dim)
        self.keys, self.values = rng.normal(1, 1, (2, *shape)).astype(np.float32)
        quick = {"xla_backend_optimization_level": 0}  # to compile
        self.append = jax.jit(cache.append, compiler_options=quick)
        self.fork = jax.jit(cache.fork, compiler_options=quick)
        self.free = jax.jit(cache.free, compiler_options=quick)

    def extend(self, state, counts, most=MOST, tokens=None):
        """Append the next `counts[b]` tokens of sequence `tokens[b]` (b itself) to row b."""
        batch = state.lengths.shape[0]
        tokens = np.arange(batch) if tokens is None else np.asarray(tokens)
        start = np.asarray(state.lengths)
        index = np.minimum(start[:, None] + np.arange(most), CAPACITY - 1)
        k, v = (jnp.asarray(x[:, tokens[:, None], index]) for x in (self.keys, self.values))
        return self.append(state, k, v, jnp.asarray(counts, jnp.int32))

    def singly(self, state, counts):
        """The same, a token at a time."""
        counts = np.asarray(counts)
        for i in range(counts.max(initial=0)):
            state = self.extend(state, (i < counts).astype(np.int32), most=1)
        return state


@pytest.fixture(scope="session", params=[GLOBAL, LOCAL], ids=["global", "local"])
def compiled(request):
    return Compiled(request.param)


@pytest.fixture(scope="session")
def same_bits():
    return _same_bits


def _same_bits(one, other):
    chex.assert_trees_all_equal_structs(one, other)
    for (where, a), b in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        a, b = np.asarray(a), np.asarray(b)
        assert a.tobytes() == b.tobytes(), jax.tree_util.keystr(where)


@pytest.fixture(scope="session")
def row_of():
    """Everything that row b of a cache holds: exact tokens by position, blocks by number."""
    return _row_of


def _row_of(state, b):
    config, length = state.config, int(state.lengths[b])
    blocks, slots = int(config.num_blocks(length)), state.table.page_table.shape[1]
    edge = config.sinks + blocks * config.block
    window = [(p - config.sinks) % state.window.keys.shape[2] for p in range(edge, length)]
    sinks = np.arange(min(config.sinks, length))
    held = [state.table.page_table[b, j % slots] for j in range(max(0, blocks - slots), blocks)]
    pages = np.asarray(held, np.int32)
    parts = {"length": length, "overflow": bool(state.overflow[b])}
    parts["sinks"] = jax.tree.map(lambda x: np.asarray(x)[:, b, sinks], state.sinks)
    parts["window"] = jax.tree.map(
        lambda x: np.asarray(x)[:, b, np.asarray(window, np.int32)], state.window
    )
    pools = [part.pool for part in state.parts]
    parts["blocks"] = jax.tree.map(lambda x: np.asarray(x)[:, pages], pools)
    if blocks and state.key_mean is not None:
        parts["mean"] = np.asarray(state.key_mean)[:, b]
    return parts
