"""Who takes what: every tile is of one program, no program has more than its share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import Schedule, deal
from pallas_kernels.primitives import triton

LENGTHS = {
    "random": lambda rng, n: rng.integers(0, 2000, n),
    "one long": lambda rng, n: np.where(np.arange(n) == n // 2, 10_000, rng.integers(0, 5, n)),
    "some empty": lambda rng, n: rng.integers(0, 300, n) * rng.integers(0, 2, n),
    "nearly equal": lambda rng, n: 500 + rng.integers(0, 3, n),
    "short": lambda rng, n: rng.integers(0, 3, n),
}


def dealt(splits, work):
    """[first, last, begin, end, start] of all programs of a kv head, the slots of all sequences."""
    batch = len(work)

    def kernel(work, stretches, pieces):
        every = triton.load(work.at[deal.sequences(batch)])
        found = deal.find(batch, splits, every)
        names = "first", "last", "begin", "end", "start"
        for i, name in enumerate(names):
            stretches[0, 0, i] = getattr(found, name)
        of_sequence = deal.pieces_of(batch, splits, every, triton.program_id(2))
        for i, x in enumerate(of_sequence):
            pieces[0, i] = x

    new = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    with triton.interpreted():
        stretches, pieces = triton.call(
            kernel, triton.Launch((splits, 1, batch), 1, 1), name="deal",
            in_specs=(triton.BlockSpec((batch,), lambda i, h, j: (0,)),),
            out_shape=[new(batch, splits, 5), new(batch, 2)],
            out_specs=[
                triton.BlockSpec((1, 1, 5), lambda i, h, j: (j, i, 0)),
                triton.BlockSpec((1, 2), lambda i, h, j: (j, 0)),
            ],
        )(jnp.asarray(work, jnp.int32))  # fmt: skip
    return np.asarray(stretches).reshape(-1, 5), np.asarray(pieces)


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize(("batch", "splits"), [(3, 7), (5, 3), (8, 1)])
def test_every_tile_is_dealt_once(kind, batch, splits):
    work = LENGTHS[kind](np.random.default_rng(batch), batch)
    assert work.min() < work.max()
    stretches, pieces = dealt(splits, work)
    tiles, written = [[] for _ in work], {}
    for number, (first, last, begin, end, start) in enumerate(stretches):
        assert end - begin <= -(-work.sum() // (batch * splits))
        for sequence in range(first, last + 1):
            mine = range(max(begin - start, 0), min(end - start, work[sequence]))
            tiles[sequence] += mine
            assert written.setdefault(number + sequence, sequence) == sequence
            start += work[sequence]
    assert [list(range(n)) for n in work] == tiles
    assert max(written) < deal.slots(batch, splits, dealt=True)
    for sequence, (first, count) in enumerate(pieces):
        found = range(first, first + count)
        assert all(written[slot] == sequence for slot in found)
        assert count > 0 or work[sequence] == 0
        assert sum(x == sequence for x in written.values()) == count or work[sequence] == 0


@pytest.mark.parametrize("tiles", [77, 2, 0])
def test_equal_lengths_have_the_splits_of_the_schedule(tiles):
    stretches, pieces = dealt(3, np.full(4, tiles))
    for j in range(4):
        for i in range(3):
            first, last, begin, end, start = stretches[3 * j + i]
            assert (begin - start, end - start) == (
                i * tiles // 3,
                (i + 1) * tiles // 3,
            ) or not tiles
            assert first == last == j or end == begin
        expected = [4 * j, 3] if tiles > 2 else pieces[j]
        np.testing.assert_array_equal(pieces[j], expected)
    assert (pieces[:, 1] > 0).all() == (tiles > 0)


@pytest.mark.parametrize(
    ("batch", "splits", "warps", "expected"),
    [(1, 64, 1, False), (8, 16, 1, True), (8, 8, 2, True), (8, 16, 2, False), (600, 1, 1, False)],
)
def test_only_programs_that_run_at_once_are_dealt(batch, splits, warps, expected):
    assert deal.dealt(batch, 8, Schedule(splits, 1, warps, 3)) == expected
