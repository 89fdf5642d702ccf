"""Attention of a chunk by tiles, on any vendor's attention, is the definition's in 16 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.attention.test_fused import SHAPE, random_cache
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
    "calibrated": dict(
        head_dim=32, key=CODEC(((8, 4), (24, 2)), "block_hadamard", scales="joint"),
        value=CODEC(((16, 3), (8, 2), (8, 1)), scales="joint"),
    ),
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
        ("calibrated", "xla", LONG),
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
        decode_by = "pallas" if vendor == "cudnn" and name != "calibrated" else "xla"
        return want, cudnn.attend(
            state, rows_of(state, 1), q, k, v, scores, sinks, decode_by=decode_by
        )

    for past in (lengths, (0, 0, 0)):  # later chunks, and a first one
        state = state.with_lengths(jnp.asarray(past, jnp.int32))
        with jax.numpy_dtype_promotion("standard"):  # the vendor is "xla" here, which mixes dtypes
            want, got = both(state, *chunk(config, 16, jnp.bfloat16))
        want, got = (np.asarray(x, np.float32) for x in (want, got))
        assert np.isfinite(got).all()
        # bfloat16 operands and shares: 2**-9 each
        assert np.linalg.norm(got - want) <= 1e-2 * np.linalg.norm(want)


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
