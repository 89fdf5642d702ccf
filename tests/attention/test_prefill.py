"""Attention of a chunk by tiles, on any vendor's attention, is the definition's in 16 bits."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.attention.test_fused import SHAPE, random_cache
from tests.layout import QUICK
from tests.marks import GPU
from turboquant_jax import cache
from turboquant_jax.attention import Scores, attend, attend_and_write, cudnn
from turboquant_jax.cache.state import rows_of

CODEC = cache.CodecConfig
SETTINGS = {
    "centred": dict(head_dim=32, key=CODEC(4), value=CODEC(2, "haar")),
    "groups": dict(
        head_dim=64, key=CODEC(((32, 3), (32, 2))), value=CODEC(((32, 2), (32, 4))),
        center_keys=False, sinks=0,
    ),
    "before RoPE": dict(
        head_dim=32, key=CODEC(4), value=CODEC(2, "haar"), sinks=1,
        rope_frequencies=tuple(300.0 ** -(np.arange(12) / 12)),
    ),
    "heads": dict(
        head_dim=32, key=CODEC(), value=CODEC(rotation="haar"), sinks=1,
        rope_frequencies=tuple(300.0 ** -(np.arange(12) / 12)),
        num_kv_heads=4, allocation=cache.Allocation((2, (4, 2, 2, 4)), (3, (2, 3, 3, 2))),
    ),
    "calibrated": dict(
        head_dim=32, key=CODEC(((8, 4), (24, 2)), "block_hadamard", scales="joint"),
        value=CODEC(((16, 3), (8, 2), (8, 1)), scales="joint"),
    ),
    "prod": dict(head_dim=64, key=CODEC(((32, 4), (32, 3)), code="prod"), value=CODEC(2, "haar")),
    "short scales": dict(head_dim=32, key=CODEC(4), value=CODEC(2, "haar"), scale_bits=8),
    "keys in full precision": dict(head_dim=32, key=CODEC(16), value=CODEC(2, "haar")),
    "values in full precision": dict(head_dim=32, key=CODEC(4), value=CODEC(16)),
}  # fmt: skip


def chunk(config, count, dtype):
    rng = np.random.default_rng(7)
    heads = config.num_kv_heads
    shapes = [(3, count, n, config.head_dim) for n in (2 * heads, heads, heads)]
    return [jnp.asarray(rng.normal(0, 1, shape), dtype) for shape in shapes]


# Lengths and rows of queries of a product, with tiles of two blocks: an empty sequence and one
# without a block beside one that ends within a tile, of 11 blocks, all heads at once; sequences of
# 12, 9 and 10 blocks, head by head.
RAGGED, LONG = ((0, 3, 367), 10**6), ((399, 300, 331), 1)


@pytest.mark.parametrize(
    ("name", "vendor", "past"),
    [
        ("centred", "xla", LONG),
        ("groups", "xla", RAGGED),
        ("before RoPE", "xla", LONG),
        ("calibrated", "xla", LONG),
        ("heads", "xla", LONG),
        ("prod", "xla", RAGGED),
        ("short scales", "xla", RAGGED),
        ("keys in full precision", "xla", RAGGED),
        ("values in full precision", "xla", LONG),
        *(pytest.param(n, "cudnn", p, marks=GPU) for n in SETTINGS for p in (RAGGED, LONG)),
    ],
)
def test_tiles_of_the_past_and_the_chunk_merge_to_the_definition(name, vendor, past, monkeypatch):
    config = cache.CacheConfig(**SHAPE | SETTINGS[name])
    lengths, rows = past
    for constant, value in (("VENDOR", vendor), ("TILE", 2 * config.block), ("ROWS", rows)):
        monkeypatch.setattr(cudnn, constant, value)
    state = random_cache(config, np.random.default_rng(7))
    scores = Scores(scale=0.2)
    sinks = jnp.asarray(np.linspace(-1, 1, 2 * config.num_kv_heads), jnp.float32)

    @jax.jit
    def both(state, q, k, v):
        with jax.default_matmul_precision("highest"):
            want = attend(state, 1, q, k, v, scores=scores, sink_logits=sinks, implementation="xla")
        decode_by = "pallas" if vendor == "cudnn" and name != "prod" else "xla"
        call = partial(cudnn.attend, state, rows_of(state, 1), (q, k, v), scores, sinks)
        return want, call(decode_by=decode_by), call(decode_by=decode_by, empty=True)

    for past in (lengths, (0, 0, 0)):  # later chunks, and a first one
        state = state.with_lengths(jnp.asarray(past, jnp.int32))
        with jax.numpy_dtype_promotion("standard"):  # the vendor is "xla" here, which mixes dtypes
            want, got, alone = both(state, *chunk(config, 16, jnp.bfloat16))
        want, got = (np.asarray(x, np.float32) for x in (want, got))
        assert np.isfinite(got).all()
        # bfloat16 operands and shares: 2**-9 each
        assert np.linalg.norm(got - want) <= 1.2e-2 * np.linalg.norm(want)
        if max(past) == 0:  # known to be empty, its past is not even compiled
            np.testing.assert_array_equal(np.asarray(alone, np.float32), got)


WINDOWS = {
    "centred": dict(head_dim=32, key=CODEC(4), value=CODEC(2, "haar")),
    "groups": dict(
        head_dim=64, key=CODEC(((32, 3), (32, 2))), value=CODEC(((32, 2), (32, 4)), "identity"),
        center_keys=False, sinks=0,
    ),
    "before RoPE": SETTINGS["before RoPE"] | dict(sinks=20),
    "prod": SETTINGS["prod"],
    "values in full precision": SETTINGS["values in full precision"],
}  # fmt: skip


def in_a_window(config, lengths, count, vendor):
    """A cache, and what the definition and the vendor make of a chunk over it."""
    state = random_cache(config, np.random.default_rng(7))
    state = state.with_lengths(jnp.asarray(lengths, jnp.int32))
    sinks = jnp.asarray(np.linspace(-1, 1, 2 * config.num_kv_heads), jnp.float32)
    served = vendor == "cudnn" and config.key.code != "prod"
    scores, decode_by = Scores(scale=0.2), "pallas" if served else "xla"

    @partial(jax.jit, compiler_options=QUICK)
    def both(state, q, k, v):
        with jax.default_matmul_precision("highest"):
            want = attend(state, 1, q, k, v, scores=scores, sink_logits=sinks, implementation="xla")
        rows = rows_of(state, 1)
        return want, cudnn.attend(state, rows, (q, k, v), scores, sinks, decode_by=decode_by)

    return both, state, chunk(config, count, jnp.bfloat16)


# On both sides of the window: its length, those of the sequences, and that of the chunk. The ring
# of blocks has gone round; of 20 sinks some are still seen; the window ends within what is never
# compressed; a chunk of its length, and of three times; a query that sees but itself. Where the
# window is as long as the past and the chunk, 416 tokens, every query sees all.
@pytest.mark.parametrize(
    ("name", "window", "lengths", "count"),
    [
        ("centred", 70, (0, 3, 399), 16),
        ("centred", 70, (69, 70, 71), 200),
        ("centred", 1, (0, 3, 399), 3),
        ("groups", 70, (0, 103, 331), 70),
        ("groups", 70, (0, 103, 331), 68),
        ("groups", 4, (2, 4, 399), 9),
        ("before RoPE", 70, (17, 68, 399), 33),
        ("before RoPE", 150, (399, 140, 160), 151),
        ("before RoPE", 70, (0, 0, 0), 100),
        ("before RoPE", 401, (399, 140, 391), 40),
        ("centred", 416, (399, 140, 391), 16),
        ("prod", 70, (0, 103, 331), 33),
        ("values in full precision", 70, (0, 103, 331), 33),
    ],
)
@pytest.mark.parametrize("vendor", ["xla", pytest.param("cudnn", marks=GPU)])
def test_behind_a_window_it_is_the_definition(name, window, lengths, count, vendor, monkeypatch):
    monkeypatch.setattr(cudnn, "VENDOR", vendor)
    config = cache.CacheConfig(**SHAPE | WINDOWS[name], sliding_window=window)
    both, state, heads = in_a_window(config, lengths, count, vendor)
    with jax.numpy_dtype_promotion("standard"):  # the vendor is "xla" here, which mixes dtypes
        want, got = (np.asarray(x, np.float32) for x in both(state, *heads))
    assert np.isfinite(got).all()
    # as above, and once more where blocks leave the rotated space; of one query, the rounding of
    # its log-sum-exps, up to 2**-9 of 10, is no average. One token too many would be 1 / sqrt(150).
    error = np.linalg.norm(got - want, axis=(2, 3)) / np.linalg.norm(want, axis=(2, 3))
    assert np.sqrt(np.mean(error**2)) <= 1.2e-2
    assert error.max() <= 3e-2


def test_behind_a_window_no_array_has_queries_times_tokens(monkeypatch):
    """But within the vendor's attention, which a stand-in takes the place of."""
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda q, k, v, **_: (q, jnp.zeros(q.shape[:3], q.dtype))
    )
    window, count = 128, 600
    config = cache.CacheConfig(**SHAPE | WINDOWS["before RoPE"], sliding_window=window)
    state = jax.eval_shape(lambda: cache.create(config, 3, 400, key=jax.random.key(0)))

    def largest(run):
        """Numbers of the largest array in a program."""
        text = jax.jit(run).lower(state, *chunk(config, count, jnp.bfloat16)).as_text()
        shapes = re.findall(r"tensor<((?:\d+x)+)", text)
        return max(math.prod(map(int, shape.split("x")[:-1])) for shape in shapes)

    def by_vendor(state, *heads):
        return cudnn.attend(state, rows_of(state, 1), heads, Scores(), None, decode_by="xla")

    numbers = 3 * 2 * config.num_kv_heads * config.head_dim  # of a token's queries
    assert largest(by_vendor) <= numbers * (count + window)
    scores = 3 * 2 * config.num_kv_heads * count**2
    assert largest(lambda *x: attend(x[0], 1, *x[1:], implementation="xla")) >= scores


def test_it_is_refused_where_it_is_not_served():
    if jax.default_backend() == "gpu":
        pytest.skip("it is served here")
    config = cache.CacheConfig(**SHAPE | SETTINGS["centred"])
    state = jax.eval_shape(lambda: cache.create(config, 3, 70, key=jax.random.key(0)))
    for attention in (attend, attend_and_write):
        with pytest.raises(NotImplementedError, match="'cudnn' got the backend 'cpu'"):
            jax.eval_shape(
                lambda s, *qkv, f=attention: f(s, 0, *qkv, implementation="cudnn"),
                state,
                *chunk(config, 4, jnp.bfloat16),
            )
