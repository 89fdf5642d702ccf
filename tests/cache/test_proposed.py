"""Proposed tokens: what is taken back leaves no trace, what stays is what was appended."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cache.conftest import GLOBAL, LOCAL
from turboquant_jax import cache
from turboquant_jax.attention import attend, attend_and_write
from turboquant_jax.cache.bytes import count_bytes
from turboquant_jax.cache.layout import block_slots

MOST, CAPACITY = 8, 48
TRELLIS = replace(GLOBAL.key, code="trellis"), replace(GLOBAL.value, code="trellis")
BEFORE_ROPE = dict(rope_frequencies=(1.0, 0.3, 0.1, 0.03))
CONFIGS = {
    "scalar, mean": GLOBAL,
    "scalar, sliding": LOCAL,
    "scalar, sliding, no block": replace(LOCAL, sliding_window=4),
    "trellis, mean before rope, no window": replace(
        GLOBAL, key=TRELLIS[0], value=TRELLIS[1], window=0, **BEFORE_ROPE
    ),
    "trellis, sliding, mean before rope": replace(
        LOCAL, key=TRELLIS[0], value=TRELLIS[1], center_keys=True, **BEFORE_ROPE
    ),
    "trellis, paged": replace(GLOBAL, key=TRELLIS[0], value=TRELLIS[1], center_keys=False),
}
QUICK = {"xla_backend_optimization_level": 0}
append = jax.jit(cache.append, compiler_options=QUICK)
commit = jax.jit(cache.commit, compiler_options=QUICK)


@partial(jax.jit, compiler_options=QUICK)
def singly(state, k, v, counts):
    """The first `counts` tokens of each row, appended one by one."""

    def step(state, new):
        token, k, v = new
        return cache.append(state, k, v, (token < counts).astype(jnp.int32)), None

    split = (jnp.moveaxis(x, 2, 0)[:, :, :, None] for x in (k, v))
    return jax.lax.scan(step, state, (jnp.arange(k.shape[2]), *split))[0]


def tokens(config, batch, count, seed):
    """Keys and values of all layers."""
    shape = (config.num_layers, batch, count, config.num_kv_heads, config.head_dim)
    made = np.random.default_rng(seed).normal(1, 1, (2, *shape))
    return tuple(jnp.asarray(x, jnp.float32) for x in made)


@jax.jit
def propose(state, k, v, counts):
    """Proposed and written, in all layers."""
    state = cache.propose(state, counts, k.shape[2])
    for layer in range(state.num_layers):
        state = cache.write(state, layer, k[layer], v[layer])
    return state


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_taken_back_was_never_there(name, same_bits):
    """Of 8 tokens 0 to 8 stay, behind 0 to 39 others: every phase of several blocks."""
    config, paged = CONFIGS[name], "paged" in name
    length, accepted = np.mgrid[: CAPACITY - MOST, : MOST + 1].reshape(2, -1).astype(np.int32)
    batch = len(length)
    pages = batch * block_slots(config, CAPACITY) if paged else None
    empty = cache.create(config, batch, CAPACITY, key=jax.random.key(1), num_pages=pages)
    every = tokens(config, batch, CAPACITY, 1)
    extend = append if paged else singly  # pages are numbered in the order they are given
    state = extend(empty, *every, length)
    at = length[:, None] + np.arange(MOST)
    new = [x[:, np.arange(batch)[:, None], at] for x in every]
    proposed = propose(state, *new, jnp.full(batch, MOST, jnp.int32))
    assert int(cache.free_pages(proposed)) == int(cache.free_pages(state))
    same_bits(replace(proposed, scratch=None).with_table(pending=state.table.pending), state)
    same_bits(commit(proposed, jnp.zeros(batch, jnp.int32)), state)
    again = append(state, *new, accepted) if paged else singly(empty, *every, length + accepted)
    same_bits(commit(proposed, jnp.asarray(accepted)), again)


@pytest.mark.parametrize("count", [1, 3])
def test_queries_see_what_they_would_have_seen(count, same_bits):
    """Ragged, each up to the end of a block: as one by one, and as a chunk that is written."""
    config, lengths, counts = GLOBAL, jnp.asarray([3, 12, 22, 40]), jnp.asarray([1, 3, 0, 2])
    empty = cache.create(config, 4, CAPACITY, key=jax.random.key(1))
    state = append(empty, *tokens(config, 4, 40, 1), lengths.astype(jnp.int32))
    assert state.layout.until_block(state.lengths).tolist() == [12, 3, 1, 7]
    k, v = tokens(config, 4, count, 2)
    q = jnp.asarray(np.random.default_rng(3).normal(size=(4, count, 4, 8)), jnp.float32)
    counts = jnp.minimum(counts, count).astype(jnp.int32)

    @jax.jit
    def together(state):
        proposed = cache.propose(state, counts, count)
        return attend_and_write(proposed, 1, q, k[1], v[1]), attend(state, 1, q, k[1], v[1])

    @jax.jit
    def singly(state):
        found = []
        for t in range(count):
            one = [x[:, :, t : t + 1] for x in (k, v)]
            found.append(attend(state, 1, q[:, t : t + 1], *(x[1] for x in one)))
            state = cache.append(state, *one, (t < counts).astype(jnp.int32))
        return jnp.concatenate(found, axis=1)

    (out, proposed), expected = together(state)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(proposed.scratch.keys[1], k[1].astype(config.dtype))
    same_bits(replace(proposed, scratch=None).with_table(pending=state.table.pending), state)
    asked = np.arange(count)[None] < counts[:, None]
    np.testing.assert_allclose(out[asked], singly(state)[asked], atol=1e-5)


def test_what_does_not_fit_is_said_and_left_out(same_bits):
    """A row past its capacity at once; one without a page, or with an odd count, at `commit`."""
    empty = cache.create(GLOBAL, 4, CAPACITY, key=jax.random.key(1), num_pages=4)
    new = tokens(GLOBAL, 4, MOST, 2)
    start = jnp.asarray([44, 14, 5, 5], jnp.int32)
    state = append(empty, *tokens(GLOBAL, 4, 44, 1), start)
    assert not state.overflow.any() and int(cache.free_pages(state)) == 0
    proposed = propose(state, *new, jnp.asarray([8, 8, 4, 4], jnp.int32))
    assert proposed.overflow.tolist() == [True, False, False, False]
    done = commit(proposed, jnp.asarray([0, 1, 5, 4], jnp.int32))
    assert done.overflow.tolist() == [True, True, True, False]
    assert done.lengths.tolist() == [44, 14, 5, 9]
    same_bits(done.window.keys[:, :3], state.window.keys[:, :3])
    again = commit(proposed, jnp.asarray([0, 0, -1, 0], jnp.int32))
    assert again.overflow.tolist() == [True, False, True, False]


def test_the_scratch_counts_and_goes(same_bits):
    state = cache.create(GLOBAL, 2, CAPACITY, key=jax.random.key(1))
    counts = jnp.asarray([4, 2], jnp.int32)
    proposed = cache.propose(state, counts, 4)
    one = 2 * 2 * 2 * 8 * 2  # keys and values, layers, heads, channels, bytes
    assert proposed.nbytes - state.nbytes == 2 * 4 * one
    assert count_bytes(proposed).total == proposed.nbytes
    assert count_bytes(proposed).window - count_bytes(state).window == 2 * 4 * one
    with pytest.raises(ValueError, match="got 5 of each sequence, expected the 4"):
        cache.write(proposed, 0, *(x[0] for x in tokens(GLOBAL, 2, 5, 1)))
    for most in (0, 9):
        with pytest.raises(ValueError, match=f"got {most} tokens, expected 1 to a block's 8"):
            cache.propose(state, counts, most)
    with pytest.raises(ValueError, match="expected proposed ones"):
        cache.commit(cache.begin(state, counts, 4), counts)
