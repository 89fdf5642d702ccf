"""Who takes what: every split has one program and one slot, and none has more than its share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import deal
from pallas_kernels.decode_attention.schedule import MIN_TILES
from pallas_kernels.primitives import triton

LENGTHS = {
    "random": lambda rng, n: rng.integers(0, 2000, n),
    "one long": lambda rng, n: np.where(np.arange(n) == n // 2, 10_000, rng.integers(0, 5, n)),
    "some empty": lambda rng, n: rng.integers(0, 300, n) * rng.integers(0, 2, n),
    "nearly equal": lambda rng, n: 500 + rng.integers(0, 3, n),
    "short": lambda rng, n: rng.integers(0, 3, n),
}


def tasks(splits, work):
    """Those of all programs of a kv head."""
    batch = len(work)
    grid = deal.programs(batch, splits), batch
    shapes = [jax.ShapeDtypeStruct(grid, jnp.int32)] * 6

    def kernel(work, *outputs):
        task = deal.find(batch, splits, triton.load(work.at[deal.sequences(batch)]))
        for ref, x in zip(outputs, task[1:], strict=True):
            ref[0, 0] = jnp.asarray(x, jnp.int32)

    block = triton.BlockSpec((1, 1), lambda i, h, j: (i, j))
    with triton.interpreted():
        found = triton.call(
            kernel, triton.Launch((grid[0], 1, batch), 1, 1), name="deal", out_shape=shapes,
            in_specs=(triton.BlockSpec((batch,), lambda i, h, j: (0,)),), out_specs=[block] * 6,
        )(jnp.asarray(work, jnp.int32))  # fmt: skip
    return deal.Task(None, *(np.asarray(x).T.ravel() for x in found))


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize(("batch", "splits"), [(3, 7), (5, 3), (8, 1)])
def test_splits_are_dealt_once_each(kind, batch, splits):
    work = LENGTHS[kind](np.random.default_rng(batch), batch)
    assert work.min() < work.max()
    share = max(-(-work.sum() // (batch * splits)), MIN_TILES)
    task = tasks(splits, work)
    there = task.exists > 0
    count = np.zeros(batch, int)
    for sequence in range(batch):
        mine = there & (task.sequence == sequence)
        count[sequence] = mine.sum()
        assert (task.splits[mine] == count[sequence]).all()
        np.testing.assert_array_equal(task.split[mine], np.arange(count[sequence]))
        slots = np.arange(count[sequence]) + sequence * splits
        slots[splits:] += task.more[mine][0] - (sequence + 1) * splits
        np.testing.assert_array_equal(task.slot[mine], slots)
    np.testing.assert_array_equal(count, np.maximum(-(-work // share), 1))
    assert len(set(task.slot[there])) == there.sum() <= deal.programs(batch, splits) * batch
    assert task.slot[there].max() < deal.slots(batch, splits)


def test_equal_lengths_have_the_splits_of_the_schedule():
    task = tasks(3, np.full(4, 77))
    there = task.exists > 0
    np.testing.assert_array_equal(there, np.arange(16) < 12)
    np.testing.assert_array_equal(task.slot[there], np.arange(12))
    np.testing.assert_array_equal(task.sequence[there], np.repeat(np.arange(4), 3))
    assert (task.splits[there] == 3).all()
