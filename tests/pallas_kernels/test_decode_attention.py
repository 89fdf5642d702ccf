"""The decode kernel against its definition in float64: interpreted on a CPU, compiled on a GPU."""

import dataclasses

import jax
import numpy as np
import pytest

from pallas_kernels.decode_attention import (
    PagedBlocks,
    Schedule,
    Sketch,
    Softmax,
    decode_attention,
)
from pallas_kernels.primitives import triton
from pallas_kernels.primitives.codebook import CodebookOperand
from tests.pallas_kernels.blocks import arrays, definition, pack, poison, random_pool

# Relative error of the output norm. Queries and shares are 15-bit integers: measured 1e-4 to 1e-3,
# the more the peakier the softmax is; a bf16 operand anywhere gives 3e-3.
TOLERANCE = 2e-3
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]
INTERPRET = [True, pytest.param(False, marks=on_gpu)]


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and options; `bits` and `channels` of each group; codes of keys and values.

    `joint`: keys, values with one scale for all groups; `sides`: their groups, where they differ.
    """

    bits: tuple = ((4, 4),)
    channels: tuple = (128,)
    tokens: int = 64
    heads: int = 4
    options: tuple = ()
    schedule: Schedule | None = None
    codes: tuple = ("scalar", "scalar")
    joint: tuple = (False, False)
    sides: tuple | None = None

    @property
    def groups(self):
        """((channels, bits), ...) of keys and of values."""
        if self.sides is not None:
            return self.sides
        pairs = list(zip(self.channels, self.bits, strict=True))
        return tuple(tuple((h, b[side]) for h, b in pairs) for side in (0, 1))

    def __str__(self):
        sides = ["+".join(f"{h}@{b}" for h, b in groups) for groups in self.groups]
        sides = [f"{s}-joint" if joint else s for s, joint in zip(sides, self.joint, strict=True)]
        bits = "/".join(sides)
        if "trellis" in self.codes:
            bits = f"{bits}-{'-'.join(self.codes)}"
        return f"{bits}-t{self.tokens}-g{self.heads}-{','.join(self.options)}"


OPTIONS = ("soft_cap", "sink_logits")
TRELLIS = ("trellis", "trellis")
CASES = [
    Case(),
    Case(((3, 2),), (64,), heads=1),
    Case(((1, 4),), (128,), tokens=32, heads=3, options=("soft_cap",)),
    Case(((2, 3),), (80,), tokens=128, options=("sink_logits",)),
    Case(((6, 5),), (64,), heads=2),
    Case(((3, 4), (2, 1)), (32, 96), heads=5),
    Case(((4, 2),), (64,), options=("sketch", *OPTIONS)),
    Case(heads=32),
    Case(((3, 2),), codes=TRELLIS),
    Case(((1, 3),), (64,), tokens=32, heads=3, codes=TRELLIS),
    Case(((2, 4), (4, 3)), (32, 64), codes=TRELLIS),
    Case(((4, 3),), (80,), codes=("scalar", "trellis")),
    Case(sides=(((16, 4), (16, 2), (32, 1)), ((64, 2),)), joint=(True, False)),
    Case(
        sides=(((32, 3), (64, 1)), ((48, 4), (16, 3), (32, 1))),
        joint=(True, True), heads=5, options=OPTIONS,
    ),
    Case(sides=(((48, 2),), ((40, 1), (8, 4))), tokens=32, options=("sketch",)),
    Case(
        sides=(((8, 8), (16, 4), (24, 3), (16, 1)), ((64, 1),)), joint=(True, False), tokens=128,
    ),
    Case(
        sides=(((16, 4), (16, 2), (32, 1)), ((32, 3), (32, 1))),
        joint=(True, True), codes=TRELLIS,
    ),
    Case(
        sides=(((32, 4), (32, 3), (32, 2), (32, 1)), ((128, 4),)),
        joint=(True, False), codes=TRELLIS,
    ),
]  # fmt: skip
GPU_CASES = [
    *(Case(((b, 9 - b),)) for b in range(1, 9)),
    *(Case(((4, 3),), (h,), tokens=t) for h in (64, 80, 96, 256) for t in (32, 64, 128)),
    *(Case(((3, 4),), heads=g, options=OPTIONS) for g in (1, 2, 5, 8, 16, 20, 32)),
    *(Case(schedule=Schedule(*s)) for s in ((1, 1, 1, 2), (3, 2, 2, 4), (7, 4, 4, 3))),
    Case(((8, 3), (2, 6)), (64, 64), options=("sketch",)),
    *(Case(((b, 4 - b),), (h,), codes=TRELLIS) for b in (1, 2, 3) for h in (64, 128)),
    *(Case(((3, 2),), (h,), tokens=t, codes=TRELLIS) for h in (80, 96, 128) for t in (32, 64, 128)),
    *(Case(((3, 3),), heads=g, options=OPTIONS, codes=TRELLIS) for g in (1, 5, 8, 16, 32)),
    *(Case(((2, 3),), codes=codes) for codes in (("trellis", "scalar"), ("scalar", "trellis"))),
    Case(((4, 4),), codes=TRELLIS), Case(((3, 6), (2, 2)), (64, 32), codes=("trellis", "scalar")),
]  # fmt: skip


@dataclasses.dataclass
class Call:
    """Arguments of the kernel, and what it must answer."""

    arguments: tuple
    keywords: dict
    out: np.ndarray
    lse: np.ndarray


def make_call(case, seed=0, slots=6, lengths=None):
    """Three sequences: one empty, one that ends inside a block, one full; or of other lengths."""
    rng = np.random.default_rng(seed)
    if lengths is None:
        lengths = (0, 3 * case.tokens + 5, slots * case.tokens)
    lengths = np.array(lengths, np.int32)
    batch = len(lengths)
    kv_heads, pages = 2, batch * slots + 2
    pool, keys, values = random_pool(
        rng, pages, kv_heads, case.tokens, case.groups, case.codes, case.joint
    )
    q = rng.standard_normal((batch, kv_heads * case.heads, keys.shape[-1])).astype(np.float32)
    table = rng.permutation(pages)[: batch * slots].reshape(batch, slots).astype(np.int32)
    heads = q.shape[1]
    every = {
        "soft_cap": 3.0,
        "sink_logits": rng.standard_normal(heads).astype(np.float32),
    }
    keywords = {name: every[name] for name in OPTIONS if name in case.options}
    keywords["sm_scale"] = 0.5 / np.sqrt(q.shape[2])
    extra = None
    if "sketch" in case.options:
        signs = rng.integers(0, 2, (pages, kv_heads, case.tokens, 64))
        norms = rng.uniform(0, 1, (pages, kv_heads, case.tokens)).astype(np.float32)
        query = rng.standard_normal((batch, heads, 64)).astype(np.float32)
        dots = np.einsum("pktm,bnm->pktbn", 2.0 * signs - 1.0, query)
        extra = dots * norms[..., None, None]
        plane = pack(signs.swapaxes(0, 1), (1,))[0]
        keywords["sketch"] = Sketch(query, plane, norms.swapaxes(0, 1))
    options = {k: v for k, v in keywords.items() if k not in ("sketch", "sm_scale")}
    out, lse = definition(
        q, keys, values, table, lengths, keywords["sm_scale"], extra=extra, **options
    )
    pool = poison(pool, table, lengths)
    unused = np.arange(slots)[None, :] * case.tokens >= lengths[:, None]
    table = np.where(unused, 2**30, table).astype(np.int32)
    return Call((q, (pool,), table, lengths), keywords, out, lse)


def attend(call, interpret, schedule=None):
    """Jitted."""
    q, *held = call.arguments
    options = {k: v for k, v in call.keywords.items() if k not in ("sketch", "sm_scale")}
    softmax = Softmax(call.keywords["sm_scale"], **options)
    inputs = arrays((q, PagedBlocks(*held), softmax, call.keywords.get("sketch")))
    with triton.interpreted(interpret):
        return jax.jit(lambda *x: decode_attention(*x[:3], sketch=x[3], schedule=schedule)[:2])(
            *inputs
        )


def assert_close(call, out, lse):
    """Output by norm, log-sum-exp by value; exactly 0 and -inf where there is nothing."""
    out, lse = np.asarray(out), np.asarray(lse)
    assert np.linalg.norm(out - call.out) <= TOLERANCE * np.linalg.norm(call.out)
    assert np.all(out[call.out.sum(axis=2) == 0] == 0)
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(call.lse))
    seen = np.isfinite(call.lse)
    np.testing.assert_allclose(lse[seen], call.lse[seen], atol=3e-3)


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_definition(case, interpret):
    """Unused pages, table entries and the rest of the last page hold poison."""
    call = make_call(case)
    assert_close(call, *attend(call, interpret, case.schedule))


@pytest.mark.parametrize("case", GPU_CASES, ids=str)
@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
def test_equals_definition_compiled(case):
    """What takes long to interpret: all widths, head dims, group sizes and schedules."""
    call = make_call(case)
    assert_close(call, *attend(call, False, case.schedule))


UNLIKE = (0, 64, 40 * 64, 1, 7 * 64 + 5, 20 * 64)
UNLIKE_CASES = [
    Case(((4, 2),), (64,), schedule=Schedule(2, 1, 1, 3)),
    Case(((2, 3),), (64,), heads=9, schedule=Schedule(1, 2, 4, 3), options=OPTIONS),
]


@pytest.mark.parametrize("interpret", INTERPRET)
@pytest.mark.parametrize("case", UNLIKE_CASES, ids=str)
def test_unlike_lengths_equal_the_definition(case, interpret):
    """The longest sequence has more splits than the schedule's, the shortest have fewer."""
    call = make_call(case, slots=40, lengths=UNLIKE)
    assert_close(call, *attend(call, interpret, case.schedule))


@pytest.mark.parametrize("interpret", INTERPRET)
def test_equal_lengths_have_the_bits_of_each_sequence_alone(interpret):
    """Whose splits are those of the schedule."""
    call = make_call(Case(((2, 2),), (64,)), slots=9, lengths=[9 * 64 - 3] * 3)
    schedule = Schedule(2, 1, 1, 3)
    out, lse = attend(call, interpret, schedule)
    q, pools, table, lengths = call.arguments
    for i in range(3):
        own = (q[i : i + 1], pools, table[i : i + 1], lengths[i : i + 1])
        alone = attend(dataclasses.replace(call, arguments=own), interpret, schedule)
        np.testing.assert_array_equal(alone[0][0], out[i])
        np.testing.assert_array_equal(alone[1][0], lse[i])


LONG = [
    *(Case(channels=(h,), heads=g) for h, g in ((64, 1), (80, 2), (128, 4), (128, 8), (256, 4))),
    *(Case(((b, b),)) for b in (2, 3)),
    Case(heads=32),
    Case(((4, 4), (4, 4)), (48, 80), tokens=32, heads=5, options=OPTIONS),
    Case(codes=TRELLIS),
]


@pytest.mark.parametrize("case", LONG, ids=str)
@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
def test_many_splits_equal_the_definition_compiled(case):
    """Schedules are chosen for long sequences: 24 splits or more, whose pipelines are filled."""
    call = make_call(case, slots=200 * 64 // case.tokens)
    assert_close(call, *attend(call, False))


@pytest.mark.parametrize("interpret", INTERPRET)
def test_levels_of_few_steps_beside_many(interpret):
    """Signs in steps of 0.8 do not coarsen the unit of 4 bits in steps of 0.044, nor of 5 bits.

    Scores are right to 4e-5 of the largest; in one unit for all steps, as they are, to 4e-4.
    """
    rng = np.random.default_rng(6)
    books = [
        CodebookOperand(bits, tuple((2 * i + 1 - 2**bits) * k for i in range(2**bits)), step)
        for bits, k, step in ((4, 4, 0.044), (5, 200, 0.00046), (1, 1, 0.8))
    ]
    sides = tuple((32, book) for book in books), ((96, 2),)
    pool, keys, values = random_pool(rng, 4, 1, 64, sides, ("scalar",) * 2, (True, False))
    q = rng.standard_normal((1, 4, 96)).astype(np.float32)
    table, lengths = np.arange(4, dtype=np.int32)[None], np.array([256], np.int32)
    _, lse = definition(q, keys, values, table, lengths, 1.0)
    inputs = arrays((q, PagedBlocks((pool,), table, lengths), Softmax(1.0)))
    with triton.interpreted(interpret):
        _, found = jax.jit(lambda *x: decode_attention(*x)[:2])(*inputs)
    assert np.abs(np.asarray(found) - lse).max() <= 4e-5 * np.abs(lse).max()


FORMATS = (
    ((((64, 2),), ((64, 4),)), (False, False)),
    ((((16, 4), (16, 2), (32, 1)), ((64, 2),)), (True, False)),
    ((((64, 8),), ((32, 3), (32, 1))), (False, True)),
)


@pytest.mark.parametrize("interpret", INTERPRET)
def test_heads_of_several_formats(interpret):
    """Each head has what it has in a call of its own, bit by bit: only its pool is read."""
    rng = np.random.default_rng(4)
    pools = [random_pool(rng, 12, 2, 64, sides, ("scalar",) * 2, j)[0] for sides, j in FORMATS]
    heads = np.array([[1, 1, 3], [1, 0, 0], [0, 0, 2], [2, 1, 1]], np.int32)
    q = rng.standard_normal((2, 12, 64)).astype(np.float32)
    table = rng.permutation(12).reshape(2, 6).astype(np.int32)
    lengths = np.array([330, 384], np.int32)  # as many tiles: one format's splits are dealt
    schedule = Schedule(2, 1, 2, 3)

    def run(q, pools, **options):
        held = PagedBlocks(tuple(pools), table, lengths, **options)
        inputs = arrays((q, held, Softmax(0.1)))
        with triton.interpreted(interpret):
            return jax.jit(lambda *x: decode_attention(*x, schedule=schedule)[:2])(*inputs)

    found = run(q, pools, heads=heads)
    for number, row, head in heads:
        own = slice(3 * head, 3 * head + 3)
        alone = run(q[:, own], [pools[number]], row=np.int32(row), kv_heads=1)
        for got, want in zip(found, alone, strict=True):
            np.testing.assert_array_equal(got[:, own], want)


def test_one_format_after_the_other_fills_the_device():
    """Programs start in the order of the grid, whose last axis is the slowest: the heads."""
    rng = np.random.default_rng(0)
    pools = tuple(random_pool(rng, 2, 4, 64, *x, ("scalar",) * 2, y)[0] for *x, y in FORMATS[:2])
    table, lengths = np.zeros((1, 4096), np.int32), np.array([4096 * 64], np.int32)
    heads = np.array([[0, 0, 1], [0, 1, 3], [1, 0, 0], [1, 1, 2]], np.int32)
    q = rng.standard_normal((1, 16, 64)).astype(np.float32)

    def programs(**held):
        inputs = arrays((q, PagedBlocks(page_table=table, lengths=lengths, **held), Softmax(0.1)))
        with triton.interpreted():
            jaxpr = jax.make_jaxpr(lambda *x: decode_attention(*x)[0])(*inputs)
        calls = [x for x in jaxpr.eqns if x.primitive.name == "pallas_call"]
        return calls[0].params["grid_mapping"].grid

    assert programs(pools=pools[:1]) == (256, 4, 1)
    assert programs(pools=pools, heads=heads) == (512, 1, 4)


def test_refuses_more_formats_than_it_has_loops_for():
    call = make_call(Case(((2, 2),), (64,)))
    q, pools, *held = arrays(call.arguments)
    heads = np.zeros((2, 3), np.int32)
    with pytest.raises(NotImplementedError, match="formats: got heads of 5, served are 1 to 4"):
        decode_attention(q, PagedBlocks(pools * 5, *held, heads=heads), Softmax(1.0))
    with pytest.raises(ValueError, match=r"heads: got \(2, 2\), expected \[kv heads, 3\]"):
        decode_attention(q, PagedBlocks(pools * 2, *held, heads=heads[:, :2]), Softmax(1.0))
    with pytest.raises(ValueError, match="heads: got none of 2 pools"):
        decode_attention(q, PagedBlocks(pools * 2, *held), Softmax(1.0))


@pytest.mark.parametrize("interpret", INTERPRET)
def test_same_bits_twice_and_whatever_lies_in_unused_pages(interpret):
    """Sums are taken in one order, and nothing unseen enters them."""
    call = make_call(Case(((2, 2),), (64,)))
    first = attend(call, interpret)
    q, pools, table, lengths = call.arguments
    keep = np.zeros(20, bool)
    keep[table[table < 20]] = True
    clean = jax.tree.map(lambda x: np.where(keep.reshape(-1, *[1] * (x.ndim - 2)), x, 0), pools)
    again = attend(dataclasses.replace(call, arguments=(q, clean, table, lengths)), interpret)
    for x, y in zip(first, again, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("interpret", INTERPRET)
def test_parts_merge_by_log_sum_exp(interpret):
    """The first block, or less of it, and what follows merge into the whole."""
    call = make_call(Case(((2, 2),), (64,)))
    whole, whole_lse = attend(call, interpret)
    q, groups, table, lengths = call.arguments
    cut = np.minimum(lengths, 64).astype(np.int32)
    left, left_lse = attend(dataclasses.replace(call, arguments=(q, groups, table, cut)), interpret)
    rest = (q, groups, table[:, 1:], lengths - cut)
    right, right_lse = attend(dataclasses.replace(call, arguments=rest), interpret)
    merged = np.logaddexp(left_lse, right_lse)
    shares = [np.exp(np.where(np.isneginf(x), -1e9, x - merged)) for x in (left_lse, right_lse)]
    out = shares[0][..., None] * left + shares[1][..., None] * right
    np.testing.assert_allclose(out, whole, atol=TOLERANCE)
    np.testing.assert_allclose(merged[1:], whole_lse[1:], atol=3e-3)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda q, g, t, n: (q[:, :3], g, t, n), ValueError, "multiple of 2 kv heads"),
        (lambda q, g, t, n: (q[:, :, :32], g, t, n), ValueError, "queries: got 32 channels"),
        (lambda q, g, t, n: (q, g, t[:2], n), ValueError, "page_table"),
        (
            lambda q, g, t, n: (q, (dataclasses.replace(g[0], keys=(), key_codebooks=()),), t, n),
            ValueError,
            "groups: got none",
        ),
        (
            lambda q, g, t, n: (np.tile(q, (1, 9, 1)), g, t, n),
            NotImplementedError,
            "query heads: got 36 a kv head",
        ),
        (
            lambda q, g, t, n: (q, (dataclasses.replace(g[0], keys=(g[0].keys[0] * 2,)),), t, n),
            ValueError,
            "planes of keys",
        ),
    ],
)
def test_refuses(change, error, words):
    """The message says what was got and what was expected."""
    call = make_call(Case(((2, 2),), (64,)))
    with pytest.raises(error, match=words):
        q, *held = arrays(change(*call.arguments))
        decode_attention(q, PagedBlocks(*held), Softmax(1.0))
