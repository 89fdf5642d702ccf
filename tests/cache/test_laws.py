"""Laws of the cache, for any schedule of appends: hypothesis looks for one that breaks them."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import crossed, design
from turboquant_jax import cache

# conftest's BATCH rows of at most CAPACITY tokens, MOST a chunk
BATCH, CAPACITY, MOST = 3, 44, 20
counts = st.lists(st.integers(0, MOST), min_size=BATCH, max_size=BATCH)
relaxed = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def cut(steps):
    """Counts of each step, cut where a row would pass the capacity."""
    room = np.full(BATCH, CAPACITY)
    for step in steps:
        step = np.minimum(step, room)
        room = room - step
        yield step


@relaxed
@given(steps=st.lists(counts, min_size=1, max_size=5))
def test_any_ragged_chunks_give_the_bits_of_single_tokens(compiled, same_bits, steps):
    chunked, singly = compiled.empty, compiled.empty
    for step in cut(steps):
        chunked = compiled.extend(chunked, step)
        singly = compiled.singly(singly, step)
        same_bits(chunked, singly)
    lengths = np.asarray(chunked.lengths)
    assert lengths.tolist() == np.minimum(np.sum(steps, 0), CAPACITY).tolist()
    assert not np.any(chunked.overflow)


@pytest.mark.parametrize("name", design.SETTINGS)
def test_chunks_give_the_bits_of_single_tokens_whatever_the_options(name, row_of, same_bits):
    empty, ragged = crossed.create(name), design.SETTINGS[name]["ragged"]
    steps = [[100, 37, 1], [90, 100, 63]] if ragged else [[100] * 3, [90] * 3]
    chunked, singly = crossed.append_both_ways(empty, steps)
    for row in range(crossed.BATCH):
        assert int(chunked.lengths[row]) == sum(step[row] for step in steps)
        same_bits(row_of(chunked, row), row_of(singly, row))
    if not design.SETTINGS[name]["paged"]:  # whose pages are numbered in the order they are given
        same_bits(chunked, singly)


@relaxed
@given(total=counts, order=st.permutations(range(2 * BATCH)), share=st.floats(0, 1))
def test_the_order_among_sequences_does_not_matter(compiled, same_bits, total, order, share):
    total = np.asarray(total)
    first = np.floor(total * share).astype(int)
    state = compiled.empty
    seen = np.zeros(BATCH, int)
    for turn in order:  # each row has two turns, in any interleaving
        row = turn % BATCH
        step = np.zeros(BATCH, int)
        step[row] = (total - first)[row] if seen[row] else first[row]
        seen[row] += 1
        state = compiled.extend(state, step)
    same_bits(state, compiled.extend(compiled.empty, total))


@relaxed
@given(before=counts, more=counts, after=counts, source=st.integers(0, 2), shift=st.integers(1, 2))
def test_a_fork_goes_its_own_way(compiled, row_of, same_bits, before, more, after, source, shift):
    target = (source + shift) % BATCH
    parent = compiled.extend(compiled.extend(compiled.empty, before), more)
    forked = compiled.fork(parent, source, target)
    for row in range(BATCH):
        same_bits(row_of(forked, row), row_of(parent, source if row == target else row))
    tokens = np.arange(BATCH)
    tokens[target] = target  # other tokens than the source would get
    room = CAPACITY - np.asarray(forked.lengths)
    after = np.minimum(after, room)
    only = np.where(np.arange(BATCH) == target, after, 0)
    child = compiled.extend(forked, only, tokens=tokens)
    same_bits(row_of(child, source), row_of(parent, source))
    # and both at once: the source as if it had never been forked, from the same pages
    both = compiled.extend(forked, after, tokens=tokens)
    alone = compiled.extend(parent, np.minimum(after, CAPACITY - np.asarray(parent.lengths)))
    same_bits(row_of(both, source), row_of(alone, source))
    same_bits(row_of(both, target), row_of(child, target))
    assert not np.any(both.overflow), "a pool with a page for every entry never runs out"


@relaxed
@given(first=counts, second=counts, rows=st.lists(st.booleans(), min_size=BATCH, max_size=BATCH))
def test_freed_rows_start_anew(compiled, row_of, same_bits, first, second, rows):
    mask = jnp.asarray(rows)
    state = compiled.free(compiled.extend(compiled.empty, first), mask)
    kept = compiled.extend(compiled.empty, np.where(rows, 0, first))
    for row in range(BATCH):
        same_bits(row_of(state, row), row_of(kept, row))
    slots = state.table.page_table.shape[1]
    assert int(cache.free_pages(state)) == slots * sum(rows)
    room = CAPACITY - np.asarray(state.lengths)
    second = np.minimum(second, room)
    again, fresh = compiled.extend(state, second), compiled.extend(kept, second)
    for row in range(BATCH):
        same_bits(row_of(again, row), row_of(fresh, row))


@relaxed
@given(first=counts, second=counts, pages=st.integers(0, 6))
def test_a_full_pool_raises_the_flag_and_writes_nothing(
    compiled, row_of, same_bits, first, second, pages
):
    ample, small = compiled.empty, compiled.free(compiled.empty, jnp.ones(BATCH, bool))
    slots = small.table.page_table.shape[1]
    taken = jnp.arange(BATCH * slots) >= pages  # a stranger holds all but `pages` pages
    small = small.with_table(references=taken.astype(jnp.int32))
    for step in (first, second):
        before, small = small, compiled.extend(small, step)
        ample = compiled.extend(ample, step)
        for row in range(BATCH):
            unlike = {"overflow": None}
            if bool(small.overflow[row]):
                same_bits(row_of(small, row) | unlike, row_of(before, row) | unlike)
            else:
                same_bits(row_of(small, row), row_of(ample, row))
        used = np.asarray(small.table.page_table)
        used = used[used >= 0]
        lengths = np.asarray(small.lengths)
        assert len(used) == np.minimum(small.config.num_blocks(lengths), slots).sum()
        assert len(set(used.tolist())) == len(used), "a page was given twice"
        assert not np.any(np.asarray(taken)[used]), "a page was taken from its owner"
        np.testing.assert_array_equal(
            small.table.references, np.bincount(used, minlength=len(taken)) + np.asarray(taken)
        )
    wanted = np.minimum(small.config.num_blocks(np.asarray(ample.lengths)), slots).sum()
    assert np.any(small.overflow) == (wanted > pages), "the flag goes up where, and only where"


def test_a_row_that_passes_its_capacity_keeps_what_it_has(compiled, row_of, same_bits):
    full = compiled.extend(compiled.empty, [MOST, MOST, 3])
    full = compiled.extend(full, [MOST, MOST, 0])
    over = compiled.extend(full, [4, 5, 1])
    assert over.overflow.tolist() == [False, True, False]
    assert over.lengths.tolist() == [CAPACITY, 2 * MOST, 4]
    same_bits(row_of(over, 1) | {"overflow": False}, row_of(full, 1))
    later = compiled.extend(over, [0, 1, 1])
    assert later.lengths.tolist() == [CAPACITY, 2 * MOST, 5], "flagged until it is freed"
    freed = compiled.free(later, jnp.asarray([False, True, False]))
    again = compiled.extend(freed, [0, 5, 0])
    assert again.overflow.tolist() == [False, False, False]
    assert again.lengths.tolist() == [CAPACITY, 5, 5]


def test_impossible_counts_raise_the_flag(compiled):
    state = compiled.extend(compiled.empty, [-1, MOST + 1, 2])
    assert state.overflow.tolist() == [True, True, False]
    assert state.lengths.tolist() == [0, 0, 2]
