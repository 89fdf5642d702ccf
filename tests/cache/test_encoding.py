"""The kernel that compresses gives the codes of the definition, but for rounding at a threshold."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.encode import call
from pallas_kernels.primitives import triton
from tests.layout import QUICK
from tests.marks import GPU
from turboquant_jax import cache
from turboquant_jax.cache import blocks, compression
from turboquant_jax.cache.choose import Compression
from turboquant_jax.cache.state import Exact, rows_of

CODEC = cache.CodecConfig
BOTH = Compression("xla", "xla"), Compression("pallas", "xla")
SMALL = dict(num_layers=2, num_kv_heads=2, block=32, window=5, sinks=2)
# between them every rotation, scale and mean of keys; a chunk compiles two kernels, tokens one
SETTINGS = {
    "stored mean": dict(head_dim=32, key=CODEC(1, "haar", scale="unbiased"), value=CODEC(3)),
    "groups": dict(
        head_dim=40, key=CODEC(((32, 3), (8, 5)), scale="matched"), value=CODEC(2, "haar"),
        center_keys=False, dtype="float32",
    ),
    "before RoPE": dict(
        head_dim=32, key=CODEC(4), value=CODEC(2, "haar", scale="norm"), window=70,
        rope_frequencies=tuple(0.7**i for i in range(16)),
    ),
    "before RoPE, groups": dict(
        head_dim=40, key=CODEC(((32, 3), (8, 5))), value=CODEC(2, "haar"), block=128,
        rope_frequencies=tuple(0.5**i for i in range(12)), dtype="float32",
    ),
}  # fmt: skip
SETTINGS["short scales"] = dict(
    head_dim=40, key=CODEC(((32, 2), (8, 3))), value=CODEC(2, "haar"), scale_bits=8
)
# a kernel of both is large: interpreted, one call has to do; where blocks lie, others show
CALLS = {"before RoPE, groups": {"single"}, "short scales": {"chunk"}}
COMPILED = SETTINGS | {
    "16": dict(
        head_dim=16, key=CODEC(1, "haar", scale="unbiased"), value=CODEC(2, "haar", scale="norm")
    ),
    "8 and 7 bits": dict(head_dim=128, key=CODEC(8), value=CODEC(7, "haar"), block=64),
    "5 and 6 bits": dict(head_dim=256, key=CODEC(5), value=CODEC(6), block=128),
    "80": dict(head_dim=80, key=CODEC(4, "haar"), value=CODEC(4, "block_hadamard"), block=64),
    "96": dict(head_dim=96, key=CODEC(3, "block_hadamard"), value=CODEC(2, "haar"), block=64),
    "128": dict(head_dim=128, key=CODEC(4, scale="unbiased"), value=CODEC(1), block=64),
    "128 before RoPE": dict(
        head_dim=128,
        key=CODEC(4),
        value=CODEC(4),
        block=64,
        rope_frequencies=tuple(1e4 ** -(i / 64) for i in range(64)),
    ),
    "96 before RoPE, in part": dict(
        head_dim=96,
        key=CODEC(3, "haar"),
        value=CODEC(2, "haar"),
        block=128,
        rope_frequencies=tuple(0.8**i for i in range(24)),
    ),
    "float16": dict(head_dim=64, key=CODEC(4), value=CODEC(4, "haar"), dtype="float16"),
}


def keys_and_values(config, count, seed):
    """Far from centred, with zeros, huge and tiny vectors, NaN and infinity."""
    rng = np.random.default_rng(seed)
    shape = (3, count, config.num_kv_heads, config.head_dim)
    x = rng.normal(0, 1, (2, *shape)) + 2 * rng.normal(0, 1, (2, 1, 1, *shape[2:]))
    x[1, 0, 5] = 0
    x[1, 0, 6] *= 1e3 if config.dtype == "float16" else 1e30
    x[1, 0, 7] *= 1e-4 if config.dtype == "float16" else 1e-30
    x[1, 0, 8, 0, 3], x[1, 0, 9, 1, 2] = np.nan, np.inf
    later = config.sinks + config.block  # keys behind the block whose mean they would spoil
    x[0, 0, later + 1] *= 1e3 if config.dtype == "float16" else 1e30
    x[0, 0, later + 2, 0, 3], x[0, 0, later + 2, 1, 2] = np.nan, np.inf
    return Exact(*(jnp.asarray(part, config.dtype) for part in x.astype(np.float32)))


def compressed(config, interpret, calls):
    """The pools after a chunk of layer 1, or single tokens, by definition and by kernel."""
    state = cache.create(config, 3, 320, key=jax.random.key(0))
    state = state.with_lengths(jnp.asarray([0, 40, 150], jnp.int32))
    window = keys_and_values(config, state.window.keys.shape[2], 1)
    state = replace(state, window=jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), window))
    chunk = keys_and_values(config, 150, 2)
    counts = jnp.asarray([150, 3, 64], jnp.int32)

    @partial(jax.jit, compiler_options=QUICK if interpret else None)
    def run(state):
        made = []
        if "chunk" in calls:
            begun = cache.begin(state, counts, 150)
            rows = rows_of(begun, 1)
            made += [[compression.compress_chunk(begun, rows, chunk, by) for by in BOTH]]
        if "single" in calls:
            full = config.sinks + config.window + config.block - 1
            lengths = jnp.asarray([full, full + 3 * config.block, full + 1], jnp.int32)
            begun = cache.begin(state.with_lengths(lengths), jnp.ones(3, jnp.int32), 1)
            made += [[compression.compress_single(begun, by) for by in BOTH]]
        return made

    with triton.interpreted(interpret):
        return run(state)


def units_apart(x, y):
    """Units in the last place, or codes of 8 bits and a base; which numbers are not zero."""
    if x.dtype == jnp.bfloat16:
        x, y = (np.where(a == 0, 0, a.view(np.uint16)).astype(np.int32) for a in (x, y))
        return np.abs(x - y), x != 0
    np.testing.assert_array_equal(x == 0, y == 0)
    logs = [32 * np.log2(np.where(a == 0, 1, a).astype(np.float64)) for a in (x, y)]
    return np.abs(logs[0] - logs[1]) / 1.4, x != 0  # a code, and a unit of the base


def assert_same(config, definition, kernel):
    """At most one code in 10^4 apart, by one level; scales alike in their bits.

    Two sums in float32 may be rounded to neighbouring scales where a tie lies between: a few in a
    thousand.
    """
    made = [
        blocks.unpack(part.codecs, part.pool)
        for state in (definition, kernel)
        for part in state.parts
    ]
    for side, other in zip(*made, strict=True):
        for (index, scale), (index_other, scale_other) in zip(side, other, strict=True):
            index, index_other = (np.asarray(x, np.int32) for x in (index, index_other))
            scale, scale_other = (np.asarray(x) for x in (scale, scale_other))
            assert np.any(scale), "nothing was compressed"
            usable = np.isfinite(scale)
            np.testing.assert_array_equal(usable, np.isfinite(scale_other))
            units, seen = units_apart(scale[usable], scale_other[usable])
            assert units.max() <= 1
            assert units[seen].mean() < 5e-3  # most pages are empty
            apart = np.abs(index - index_other)[usable]
            assert apart.max() <= 1
            assert apart.mean() < 1e-4
    if config.center_keys:
        np.testing.assert_allclose(definition.key_mean, kernel.key_mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "interpret"),
    [
        *((name, True) for name in SETTINGS),
        *(pytest.param(name, False, marks=GPU) for name in COMPILED),
    ],
)
def test_the_kernel_makes_the_codes_of_the_definition(name, interpret, monkeypatch):
    if name != "groups":  # several blocks of each program, as where there are many jobs
        monkeypatch.setattr(call, "PROGRAMS", 4)
    config, both = cache.CacheConfig(**SMALL | COMPILED[name]), {"chunk", "single"}
    calls = CALLS.get(name, both) if interpret else both
    for definition, kernel in compressed(config, interpret, calls):
        assert_same(config, definition, kernel)


def test_the_kernel_is_refused_on_the_wrong_device():
    if jax.default_backend() == "gpu":
        pytest.skip("it is served here")
    config = cache.CacheConfig(**SMALL | SETTINGS["stored mean"])
    state = jax.eval_shape(lambda: cache.create(config, 1, 70, key=jax.random.key(0)))
    with pytest.raises(NotImplementedError, match="the backend 'cpu'"):
        jax.eval_shape(lambda state: cache.commit(state, implementation="pallas"), state)
    with pytest.raises(ValueError, match="got 'cuda'"):
        jax.eval_shape(lambda state: cache.commit(state, implementation="cuda"), state)
