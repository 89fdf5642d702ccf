"""The mean that turns with the position, in the decode kernel, against complex float64 numbers."""

import dataclasses

import jax
import numpy as np
import pytest

from pallas_kernels.decode_attention import (
    BlocksOperand,
    CodebookOperand,
    ExactOperand,
    ExactPlaces,
    PagedBlocks,
    PhasesOperand,
    Schedule,
    Softmax,
    decode_attention,
)
from pallas_kernels.primitives import triton
from tests.pallas_kernels.blocks import arrays, random_blocks
from tests.pallas_kernels.test_decode_attention import INTERPRET, TOLERANCE

KV_HEADS, BATCH, PAGES, SCALE = 2, 2, 12, 0.05


@dataclasses.dataclass(frozen=True)
class Case:
    """`start`: the first token of the blocks that is seen, as a sliding window has it."""

    heads: int = 4
    channels: int = 128
    tokens: int = 64
    bits: tuple = (4, 4)
    codes: tuple = ("scalar", "scalar")
    rotary: int | None = None
    start: int = 0
    slots: int = 5
    soft_cap: float | None = None
    schedule: Schedule | None = None


CASES = [
    Case(),
    Case(7, soft_cap=20.0),
    Case(2, 64, bits=(3, 2), codes=("trellis", "trellis"), start=70),
    Case(1, 80, 32, (3, 4), start=100, slots=9),
    Case(4, 64, 128, rotary=16, start=200, slots=3),
    Case(2, 64, bits=(2, 2), slots=9, schedule=Schedule(2, 2, 1, 2, 4)),
    Case(11, 80, rotary=48, start=30, slots=4),
]


def tables(channels, rotary, sinks=4, rows=256):
    """Operand of frequencies 10,000 ** -(2 c / rotary)."""
    w = np.zeros(channels // 2)
    w[: rotary // 2] = 1e4 ** (-np.arange(rotary // 2) / (rotary // 2))
    turn = lambda p: np.exp(1j * np.asarray(p, float)[:, None] * w)  # noqa: E731
    halves = lambda z: np.concatenate([z.real, z.imag], axis=1).astype(np.float16)  # noqa: E731
    within = turn(range(64))
    return PhasesOperand(
        halves(turn(sinks + 4096 * np.arange(rows)) / 127).astype(np.float32),
        halves(turn(64 * np.arange(64))).astype(np.float32),
        np.rint(127 * np.stack([within.real, within.imag], -1)).reshape(64, -1).astype(np.int8),
        rotary,
    )


def mean_product(q, m, phases, index):
    """<q, R_p m> [len(index)] of one query and mean [H], in complex float64."""
    half, count = phases.rotary // 2, q.shape[0] // 2
    pair = np.arange(count)
    first = np.where(pair < half, pair, pair + half)
    second = np.where(pair < half, pair + half, pair + count)
    number = lambda x: x[first].astype(float) + 1j * x[second]  # noqa: E731
    halves = lambda x: x[:, :count].astype(float) + 1j * x[:, count:]  # noqa: E731
    within = phases.within[:, 0::2].astype(float) + 1j * phases.within[:, 1::2]
    turn = index // 64
    coarse = halves(phases.coarse)[np.minimum(turn // 64, phases.coarse.shape[0] - 1)]
    angle = coarse * halves(phases.fine)[turn % 64] * within[index % 64]
    return (np.conj(number(q)) * angle * number(m)).real.sum(axis=-1)


def attend(call, interpret, schedule=None):
    """(output, log-sum-exp) of (q, blocks, softmax, exact)."""
    with triton.interpreted(interpret):
        return jax.jit(
            lambda q, b, s, e: decode_attention(q, b, s, exact=e, schedule=schedule)[:2]
        )(*arrays(call))


def operand(query, mean, phases, start=0):
    """With no token in full precision seen; without a `start` only the last one of the blocks."""
    new = np.zeros((query.shape[0], 1, *mean.shape[1:]), np.float32)
    return ExactOperand(
        query=query,
        keys=(new,),
        values=(new,),
        pending=np.zeros(query.shape[0], np.int32),
        places=lambda length, pending: ExactPlaces(
            (length - 1 if start is None else start, length), ((0, 0, 0),)
        ),
        key_mean=mean,
        phases=phases,
    )


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_definition(case, interpret):
    """Pages below the first that is seen are never asked for."""
    rng = np.random.default_rng(0)
    size, channels = KV_HEADS * case.heads, case.channels
    blocks, keys, values = random_blocks(
        rng, PAGES, KV_HEADS, case.tokens, channels, case.bits, case.codes
    )
    phases = tables(channels, case.rotary or channels)
    rotated, q = rng.standard_normal((2, BATCH, size, channels)).astype(np.float32)
    m = 3.0 * rng.standard_normal((BATCH, KV_HEADS, channels)).astype(np.float32)
    table = rng.integers(0, PAGES, (BATCH, case.slots)).astype(np.int32)
    total = case.slots * case.tokens
    lengths = np.array([total, total - case.tokens + 5], np.int32)
    asked = table.copy()
    asked[:, : case.start // case.tokens] = 2**30
    held = PagedBlocks((blocks,), asked, lengths)
    softmax = Softmax(SCALE, case.soft_cap)
    out, lse = attend(
        (rotated, held, softmax, operand(q, m, phases, case.start)), interpret, case.schedule
    )
    want, want_lse = np.zeros(out.shape), np.zeros(lse.shape)
    for b, n in np.ndindex(BATCH, size):
        h, index = n // case.heads, np.arange(case.start, lengths[b])
        k, v = (x[table[b], h].reshape(-1, channels)[index] for x in (keys, values))
        score = SCALE * (k @ rotated[b, n] + mean_product(q[b, n], m[b, h], phases, index))
        if case.soft_cap is not None:
            score = case.soft_cap * np.tanh(score / case.soft_cap)
        weight = np.exp(score - score.max())
        want[b, n] = weight @ v / weight.sum()
        want_lse[b, n] = np.log(weight.sum()) + score.max()
    assert np.linalg.norm(out - want) <= TOLERANCE * np.linalg.norm(want)
    np.testing.assert_allclose(lse, want_lse, atol=3e-3)


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize("bits", [4, 8])
def test_scores_far_away_of_large_means(bits, interpret):
    """One token seen, of a key of 0: its log-sum-exp is the score, right to 1e-3 of its size.

    At 4 bits all levels are 0, at 8 bits the scale is. The size is that of the product of vectors
    in random directions, |q| |m| / sqrt(128).
    """
    rng = np.random.default_rng(1)
    levels = (0,) * 16 if bits == 4 else tuple(range(-128, 128))
    book = CodebookOperand(bits, levels, 1.0)
    plane = rng.integers(0, 256, (1, 1, 64, 128 * bits // 8)).astype(np.uint8)
    values = rng.integers(0, 256, (1, 1, 128, 64 * bits // 8)).astype(np.uint8)
    words = np.full((1, 1, 64), 0x3F803F80 if bits == 4 else 0x3F800000, np.uint32)
    phases = tables(128, 128)
    far = np.array(2 * [0, 63, 4095, 70_001, 524_288, 1_048_575], np.int32)
    size = np.repeat([20.0, 1000.0], 6)
    q, m = rng.standard_normal((2, 12, 1, 128)).astype(np.float32)
    m *= (size[:, None] / np.linalg.norm(m[:, 0], axis=1, keepdims=True))[:, None].astype(
        np.float32
    )
    # a pool of one page, which every block has
    blocks = BlocksOperand(((plane,),), ((values,),), (words,), (book,), (book,))
    held = PagedBlocks((blocks,), np.zeros((12, 1), np.int32), far + 1)
    _, lse = attend((q, held, Softmax(1.0), operand(q, m, phases, None)), interpret)
    want = [mean_product(q[i, 0], m[i, 0], phases, far[i : i + 1])[0] for i in range(12)]
    allowed = 1e-3 * np.linalg.norm(q[:, 0], axis=1) * size / np.sqrt(128)
    assert np.all(np.abs(np.asarray(lse)[:, 0] - want) <= allowed)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_makes_nan(bad):
    """Of the mean or of a query: of their heads only."""
    rng = np.random.default_rng(2)
    blocks, *_ = random_blocks(rng, PAGES, KV_HEADS, 64, 64, (2, 2))
    rotated, q = rng.standard_normal((2, 1, 4, 64)).astype(np.float32)
    m = rng.standard_normal((1, KV_HEADS, 64)).astype(np.float32)
    m[0, 1, 3], q[0, 0, 40] = bad, bad
    held = PagedBlocks((blocks,), np.arange(2, dtype=np.int32)[None], np.full(1, 100, np.int32))
    out, lse = attend((rotated, held, Softmax(SCALE), operand(q, m, tables(64, 64))), True)
    np.testing.assert_array_equal(np.isnan(lse[0]), [True, False, True, True])
    np.testing.assert_array_equal(np.isnan(out[0]).all(axis=1), [True, False, True, True])


def test_refuses_tables_of_other_channels():
    """The message says what was got and what was expected."""
    rng = np.random.default_rng(3)
    blocks, *_ = random_blocks(rng, PAGES, KV_HEADS, 64, 64, (2, 2))
    q, m = np.zeros((1, 4, 64), np.float32), np.zeros((1, KV_HEADS, 64), np.float32)
    held = PagedBlocks((blocks,), np.zeros((1, 2), np.int32), np.full(1, 100, np.int32))
    with pytest.raises(ValueError, match=r"phases: got fine \(64, 32\)"):
        attend((q, held, Softmax(SCALE), operand(q, m, tables(32, 32))), True)
