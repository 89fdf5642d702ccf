"""Attention over a cache against softmax over the decoded vectors, in float64 numpy.

Its bytes are drawn at random, so that every code, page and slot is met, not only the likely ones.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.layout import (
    CAPACITY,
    CODEC,
    QUICK,
    SMALL,
    decoded,
    empty_cache,
    random_parts,
    random_tokens,
)
from turboquant_jax import cache
from turboquant_jax.attention import attend
from turboquant_jax.segments import Scores

ALL_BITS = tuple((8, bits) for bits in range(1, 9))
SETTINGS = {
    "plain": dict(head_dim=16, key=CODEC(4), value=CODEC(2)),
    "every bit width": dict(head_dim=64, key=CODEC(ALL_BITS), value=CODEC(ALL_BITS[::-1])),
    "trellis": dict(
        head_dim=16,
        key=CODEC(2, code="trellis"),
        value=CODEC(((8, 1), (8, 4)), "haar", code="trellis"),
        center_keys=False,
        window=0,
    ),
    "outliers": dict(
        head_dim=128,
        key=CODEC(((32, 3), (96, 2)), "block_hadamard"),
        value=CODEC(((32, 3), (96, 2)), "haar", "lloyd_max"),
        num_kv_heads=1,
        block=16,
    ),
    "no sinks": dict(head_dim=16, key=CODEC(3, "haar"), value=CODEC(8), sinks=0, window=16),
    "nothing compressed": dict(head_dim=16, window=100),
    "sliding window": dict(
        head_dim=16, key=CODEC(1, "identity"), value=CODEC(5), sliding_window=30, dtype="bfloat16"
    ),
}
BATCH = 4
attend_one = jax.jit(attend, compiler_options=QUICK)


def random_cache(config, rng):
    """Any bytes, any pages, any lengths: everything that the arrays can say."""
    layers, heads, dim = config.num_layers, config.num_kv_heads, config.head_dim
    mixed = not isinstance(config.key.bits, int)
    orders = [
        rng.permuted(np.tile(np.arange(dim, dtype=np.int32), (layers, heads, 1)), axis=-1)
        for _ in range(2)
    ]
    options = dict(key_order=orders[0], value_order=orders[1]) if mixed else {}
    state = empty_cache(config, BATCH, **options)

    table = rng.permutation(state.page_table.size).astype(np.int32)
    lengths = np.array([0, 1, CAPACITY - 3, rng.integers(20, CAPACITY - 3)], np.int32)
    return replace(
        state,
        **random_parts(state, rng),
        page_table=jnp.asarray(table.reshape(state.page_table.shape)),
        lengths=jnp.asarray(lengths),
    )


def softmax_attention(config, tokens, q, position, scores, sink_logits):
    """One query [N, H] over {position: (key, value)}, float64."""
    kept = [
        kv for p, kv in tokens.items()
        if p <= position and (config.sliding_window or np.inf) > position - p
    ]  # fmt: skip
    keys, values = (np.stack([kv[i] for kv in kept]) for i in (0, 1))  # [S, K, H]
    group = q.shape[0] // keys.shape[1]
    keys, values = (np.repeat(x, group, axis=1) for x in (keys, values))
    logits = np.einsum("nh,snh->ns", q, keys) * (scores.scale or q.shape[1] ** -0.5)
    if scores.softcap is not None:
        logits = scores.softcap * np.tanh(logits / scores.softcap)
    extra = -np.inf if sink_logits is None else sink_logits[:, None]
    top = np.maximum(logits.max(-1, keepdims=True), extra)
    weight = np.exp(logits - top)
    total = weight.sum(-1, keepdims=True) + np.exp(extra - top)
    return np.einsum("ns,snh->nh", weight / total, values)


@pytest.mark.parametrize("name", SETTINGS)
def test_attention_over_the_cache_is_attention_over_the_decoded_vectors(name):
    config = cache.CacheConfig(**SMALL | SETTINGS[name])
    rng = np.random.default_rng(3)
    state = random_cache(config, rng)
    count, heads, layer = 1 if name == "every bit width" else 3, 2 * config.num_kv_heads, 1
    scores = Scores(scale=0.3, softcap=4.0) if name == "sliding window" else Scores()
    sink_logits = rng.normal(0, 1, heads).astype(np.float32) if name == "outliers" else None
    shape = (BATCH, count, config.num_kv_heads, config.head_dim)
    k, v = rng.normal(0, 1, (2, *shape)).astype(np.float32)
    q = rng.normal(0, 1, (BATCH, count, heads, config.head_dim)).astype(np.float32)
    logits = None if sink_logits is None else jnp.asarray(sink_logits)
    run = jax.jit(
        lambda s, q, k, v: attend(s, layer, q, k, v, scores=scores, sink_logits=logits),
        compiler_options=QUICK,
    )
    out = np.asarray(run(state, *map(jnp.asarray, (q, k, v))))
    k, v = (np.asarray(x.astype(config.dtype)).astype(np.float64) for x in (k, v))
    for row in range(BATCH):
        tokens, start = decoded(state, layer, row), int(state.lengths[row])
        tokens |= {start + t: [k[row, t], v[row, t]] for t in range(count)}
        for t in range(count):
            expected = softmax_attention(
                config, tokens, q[row, t].astype(np.float64), start + t, scores, sink_logits
            )
            # float32 sums of some 70 terms of order 1: 1e-5 is 80 units in the last place
            np.testing.assert_allclose(out[row, t], expected, rtol=0, atol=1e-5 * v.std() * 3)
    assert len(decoded(state, layer, 2)) < CAPACITY or name != "sliding window"


def test_a_chunk_still_sees_the_ring_blocks_that_its_fork_replaces():
    """Shared pages leave the table only at `commit`: before it, queries look at the old blocks."""
    config = cache.CacheConfig(
        **SMALL | dict(head_dim=16, key=CODEC(4), value=CODEC(4), sliding_window=40, window=2)
    )
    state = random_cache(config, np.random.default_rng(4))
    state = replace(state, lengths=jnp.asarray([50, 0, 0, 0], jnp.int32))
    q, k, v = random_tokens(config, 16, 4)
    four = jnp.zeros(4, jnp.int32)  # the same chunk for every row

    @partial(jax.jit, compiler_options=QUICK)
    def run(state, counts):
        begun = cache.begin(state, counts, 16)
        return begun, attend(begun, 1, q[four], k[1][four], v[1][four])

    owned = replace(state, references=jnp.ones_like(state.references))
    _, alone = run(owned, jnp.asarray([16, 0, 0, 0]))
    begun, out = run(cache.fork(owned, 0, 1), jnp.asarray([16, 16, 0, 0]))
    assert not np.array_equal(begun.pending_pages[0], begun.pending_pages[1])
    np.testing.assert_array_equal(out[0], alone[0])
    np.testing.assert_array_equal(out[1], alone[0])


def random_step(config, rng):
    state = random_cache(config, rng)
    shapes = [(BATCH, 1, heads, config.head_dim) for heads in (4, 2, 2)]
    return state, [jnp.asarray(rng.normal(0, 1, shape), jnp.float32) for shape in shapes]


def test_what_other_sequences_left_behind_poisons_nobody():
    config = cache.CacheConfig(**SMALL | SETTINGS["plain"])
    state, qkv = random_step(config, np.random.default_rng(8))
    empty = state.lengths == 0
    assert empty.tolist() == [True, False, False, False]
    table = jnp.where(empty[:, None], -1, state.page_table)  # row 0 was freed
    clean = replace(state, page_table=table)
    pages = np.asarray(state.page_table[0])
    nan = jnp.uint32(0x7FC07FC0)
    bad = replace(
        clean,
        window=jax.tree.map(lambda x: x.at[:, 0].set(jnp.nan), clean.window),
        sinks=jax.tree.map(lambda x: x.at[:, 0].set(jnp.nan), clean.sinks),
        pool=replace(clean.pool, scales=tuple(x.at[:, pages].set(nan) for x in state.pool.scales)),
    )
    one, other = attend_one(clean, 0, *qkv), attend_one(bad, 0, *qkv)
    assert np.isfinite(one).all()
    np.testing.assert_array_equal(one, other)


def test_permuted_pages_hold_the_same_blocks():
    config = cache.CacheConfig(**SMALL | SETTINGS["plain"])
    rng = np.random.default_rng(8)
    state, qkv = random_step(config, rng)
    for _ in range(5):
        move = rng.permutation(state.references.shape[0]).astype(np.int32)
        moved = replace(
            state,
            page_table=jnp.asarray(move)[state.page_table],
            pool=jax.tree.map(lambda x, move=move: x.at[:, move].set(x), state.pool),
        )
        one, other = attend_one(state, 0, *qkv), attend_one(moved, 0, *qkv)
        np.testing.assert_array_equal(one, other)


def test_shapes_that_do_not_fit_are_refused():
    config = cache.CacheConfig(**SMALL | dict(head_dim=16))
    state = jax.eval_shape(lambda: cache.create(config, 2, 40, key=jax.random.key(0)))

    def call(q, k, **options):
        q, k, v = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (q, k, (2, 1, 2, 16)))
        jax.eval_shape(partial(attend, **options), state, 0, q, k, v)

    for q, k, says in [
        ((2, 1, 3, 16), (2, 1, 2, 16), "multiple of 2"),
        ((1, 1, 4, 16), (2, 1, 2, 16), r"queries must be \(2, T, N, 16\)"),
        ((2, 1, 4, 16), (2, 1, 2, 8), "keys and values must be"),
    ]:
        with pytest.raises(ValueError, match=says):
            call(q, k)
    with pytest.raises(ValueError, match="'xla', 'pallas', 'cudnn' or None, got 'cuda'"):
        call((2, 1, 4, 16), (2, 1, 2, 16), implementation="cuda")
