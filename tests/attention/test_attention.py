"""Attention over a cache against softmax over the decoded vectors, in float64 numpy.

Its bytes are drawn at random, so that every code, page and slot is met, not only the likely ones.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import crossed, design
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
from turboquant_jax.attention import Scores, attend

ALL_BITS = tuple((8, bits) for bits in range(1, 9))
PLAIN = dict(head_dim=16, key=CODEC(4), value=CODEC(2))
OTHERS = {  # what no setting of the design has
    "every bit width": dict(head_dim=64, key=CODEC(ALL_BITS), value=CODEC(ALL_BITS[::-1])),
    "nothing compressed": dict(head_dim=16, window=100),
    "calibrated keys": dict(
        head_dim=32, key=CODEC(((8, 4), (8, 2), (16, 1)), scales="joint"), value=CODEC(3)
    ),
    "calibrated, of different groups": dict(
        head_dim=32,
        key=CODEC(((8, 3), (24, 2)), "block_hadamard", code="trellis", scales="joint_products"),
        value=CODEC(((16, 3), (8, 2), (8, 1)), scales="joint"),
    ),
    "short scales": dict(
        head_dim=16, key=CODEC(((8, 3), (8, 2))), value=CODEC(3, code="trellis"), scale_bits=8
    ),
    "keys in full precision": dict(
        head_dim=16, key=CODEC(16), value=CODEC(3, code="trellis"), dtype="bfloat16"
    ),
    "values in full precision": dict(
        head_dim=16, key=CODEC(((8, 3), (8, 2))), value=CODEC(16), dtype="float16", scale_bits=8
    ),
}
BATCH = 4
attend_one = jax.jit(attend, compiler_options=QUICK)


def random_cache(config, rng):
    """Any bytes, any pages, any lengths: everything that the arrays can say."""
    layers, heads, dim = config.num_layers, config.num_kv_heads, config.head_dim
    mixed = not isinstance(config.key.bits, int) and config.key.scales == "group"
    orders = [
        rng.permuted(np.tile(np.arange(dim, dtype=np.int32), (layers, heads, 1)), axis=-1)
        for _ in range(2)
    ]
    options = dict(key_order=orders[0], value_order=orders[1]) if mixed else {}
    state = empty_cache(config, BATCH, **options)

    slots = state.table.page_table.shape[1]
    table = rng.permutation(BATCH * slots).astype(np.int32).reshape(BATCH, slots)
    lengths = np.array([0, 1, CAPACITY - 3, rng.integers(20, CAPACITY - 3)], np.int32)
    return replace(state, **random_parts(state, rng)).with_table(
        page_table=jnp.asarray(table), lengths=jnp.asarray(lengths)
    )


@pytest.mark.parametrize("name", design.SETTINGS)
def test_attention_over_the_cache_is_attention_over_the_decoded_vectors(name):
    case = crossed.case(name)
    want, got = case.expected(crossed.COUNT), case.definition()
    # float32 sums of some 300 terms of order 1; rounding of the large logits moves their shares,
    # and a turned mean has 13 bits, of which float64 may round the last one otherwise
    np.testing.assert_allclose(got[:, :, 1:], want[:, :, 1:], rtol=0, atol=1e-4)
    np.testing.assert_allclose(got[:, :, 0], want[:, :, 0], rtol=0, atol=5e-4)
    if case.scores.softcap is None:
        assert case.largest_logit() > 150, "large enough for exp to overflow"


@pytest.mark.parametrize("name", OTHERS)
def test_it_is_so_with_every_bit_width_and_without_blocks(name):
    config = cache.CacheConfig(**SMALL | OTHERS[name])
    state, (q, k, v) = random_step(config, np.random.default_rng(3))
    out = np.asarray(attend_one(state, 1, q, k, v))
    for row in range(BATCH):
        tokens, length = decoded(state, 1, row), int(state.lengths[row])
        tokens[length] = [np.asarray(x[row, 0].astype(config.dtype), float) for x in (k, v)]
        query = np.asarray(q[row, 0], float)
        want = crossed.softmax_attention(config, tokens, query, length, Scores(), None)
        np.testing.assert_allclose(out[row, 0], want, rtol=0, atol=3e-5)


def test_a_chunk_still_sees_the_ring_blocks_that_its_fork_replaces():
    """Shared pages leave the table only at `commit`: before it, queries look at the old blocks."""
    config = cache.CacheConfig(
        **SMALL | dict(head_dim=16, key=CODEC(4), value=CODEC(4), sliding_window=40, window=2)
    )
    state = random_cache(config, np.random.default_rng(4))
    state = state.with_lengths(jnp.asarray([50, 0, 0, 0], jnp.int32))
    q, k, v = random_tokens(config, 16, 4)
    four = jnp.zeros(4, jnp.int32)  # the same chunk for every row

    @partial(jax.jit, compiler_options=QUICK)
    def run(state, counts):
        begun = cache.begin(state, counts, 16)
        return begun, attend(begun, 1, q[four], k[1][four], v[1][four])

    owned = state.with_table(references=jnp.ones_like(state.table.references))
    _, alone = run(owned, jnp.asarray([16, 0, 0, 0]))
    begun, out = run(cache.fork(owned, 0, 1), jnp.asarray([16, 16, 0, 0]))
    assert not np.array_equal(*begun.table.pending_pages[:2])
    np.testing.assert_array_equal(out[0], alone[0])
    np.testing.assert_array_equal(out[1], alone[0])


def random_step(config, rng):
    state = random_cache(config, rng)
    shapes = [(BATCH, 1, heads, config.head_dim) for heads in (4, 2, 2)]
    return state, [jnp.asarray(rng.normal(0, 1, shape), jnp.float32) for shape in shapes]


def test_what_other_sequences_left_behind_poisons_nobody():
    config = cache.CacheConfig(**SMALL | PLAIN)
    state, qkv = random_step(config, np.random.default_rng(8))
    empty = state.lengths == 0
    assert empty.tolist() == [True, False, False, False]
    table = state.table.page_table
    clean = state.with_table(page_table=jnp.where(empty[:, None], -1, table))  # row 0 was freed
    (part,), pages, nan = state.parts, np.asarray(table[0]), jnp.uint32(0x7FC07FC0)
    scales = tuple(x.at[:, pages].set(nan) for x in part.pool.scales)
    bad = replace(
        clean,
        window=jax.tree.map(lambda x: x.at[:, 0].set(jnp.nan), clean.window),
        sinks=jax.tree.map(lambda x: x.at[:, 0].set(jnp.nan), clean.sinks),
        parts=(replace(part, pool=replace(part.pool, scales=scales)),),
    )
    one, other = attend_one(clean, 0, *qkv), attend_one(bad, 0, *qkv)
    assert np.isfinite(one).all()
    np.testing.assert_array_equal(one, other)


def test_permuted_pages_hold_the_same_blocks():
    config = cache.CacheConfig(**SMALL | PLAIN)
    rng = np.random.default_rng(8)
    state, qkv = random_step(config, rng)
    for _ in range(5):
        move = rng.permutation(state.table.references.shape[0]).astype(np.int32)
        (part,) = state.parts
        pool = jax.tree.map(lambda x, move=move: x.at[:, move].set(x), part.pool)
        moved = replace(state, parts=(replace(part, pool=pool),)).with_table(
            page_table=jnp.asarray(move)[state.table.page_table]
        )
        one, other = attend_one(state, 0, *qkv), attend_one(moved, 0, *qkv)
        np.testing.assert_array_equal(one, other)


def test_shapes_that_do_not_fit_are_refused():
    config = cache.CacheConfig(**SMALL | dict(head_dim=16))
    state = jax.eval_shape(lambda: cache.create(config, 2, 40, key=jax.random.key(0)))

    def call(*arrays, **options):
        arrays = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in arrays)
        jax.eval_shape(partial(attend, **options), state, 0, *arrays)

    fits = (2, 1, 2, 16)
    for *arrays, says in [
        ((2, 1, 3, 16), fits, fits, "expected .B, T, N, 16. with N a multiple of 2"),
        ((2, 1, 4, 8), fits, fits, r"queries: got \(2, 1, 4, 8\)"),
        (*[(1, 1, 2, 16)] * 3, "queries: got 1 sequences, expected the cache's 2"),
        ((1, 1, 4, 16), fits, fits, r"keys and values: .*, expected \(1, 1, 2, 16\)"),
        ((2, 1, 4, 16), (2, 1, 2, 8), fits, r"got \(2, 1, 2, 8\) and"),
        ((2, 1, 4, 16), fits, (2, 1, 1, 16), r"and \(2, 1, 1, 16\), expected \(2, 1, 2, 16\)"),
    ]:
        with pytest.raises(ValueError, match=says):
            call(*arrays)
    names = "'xla', 'pallas', 'cudnn' or None"
    with pytest.raises(ValueError, match=f"implementation: got 'cuda', expected {names}"):
        call((2, 1, 4, 16), fits, fits, implementation="cuda")
