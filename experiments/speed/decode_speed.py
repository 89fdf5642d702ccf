"""How fast decode attention reads a compressed cache, against cuDNN on bf16.

One new token per sequence, 32 query and 8 kv heads of 128 channels. A call's output is the next
call's query; the calls of a chain read different caches, which together are larger than L2. Times
are those of the device by the profiler, medians over chains: `milliseconds` the sum of all kernels
of a call, `span_milliseconds` with the gaps between them, which a chain of kernels that are shorter
than their launches has. Bytes are those of the packed cache (codes and scales).

`pallas-exact` sees one newest token in full precision too, as a mean of the keys needs: `mean`
is "" for none, "stored" or "pre_rope". `queries`: query heads a kv head, 4 where it is empty.

`lengths`: of sequences whose mean is `tokens`, with room for half of all tokens in each. "equal",
"uniform" (evenly spread between 1/8 and 15/8 of the mean, in random order) or "one long" (one has
half of all tokens). cuDNN's time beside them is that of equal lengths.

`pallas-7x` are heads of four calibrated formats, or of `two` (`calibrated_blocks`), with the mean
before RoPE; bits are means over the heads. `calibrated_before` is a run in which all formats were
attended to at once.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness.experiment import GPU, Row, Track, option
from experiments.speed import calibrated_blocks, speed_claims
from experiments.speed.common import CHANNELS, KV_HEADS, Code, cache_config, check, vendor
from experiments.speed.decode_blocks import (
    PAGE,
    SM_SCALE,
    Pair,
    attend_with_newest,
    int8_xla,
    means,
    random_blocks,
)
from experiments.speed.decode_schedules import GROUP, pairs, schedule_of, sweep_schedules
from experiments.speed.device_time import copy_bandwidth, device_time
from pallas_kernels.decode_attention import (
    BlocksOperand,
    PagedBlocks,
    Schedule,
    Softmax,
    decode_attention,
)
from pallas_kernels.primitives.codebook import CodeKind

SHAPES = ((32, 4096), (8, 32768), (1, 131072), (1, 8192))
BITS = ((4, 4), (3, 3), (2, 2), (4, 3), (3, 2))
# Of trellis codes: the presets'.
TRELLIS_BITS = ((4, 4), (3, 3), (3, 2), (2, 2))
MEANS = ("", "stored", "pre_rope")
LENGTHS = ("equal", "uniform", "one long")
NEEDS = GPU
KEYS = ("implementation", "bits_k", "bits_v", "batch", "tokens", "mean", "queries", "lengths")


@dataclass(frozen=True)
class Config:
    """What to run."""

    cases: str = option(
        "all",
        "all, mean: with and without a mean, calibrated: heads of several formats, or lengths: "
        "equal and unlike ones",
        choices=("all", "mean", "calibrated", "lengths"),
    )
    shapes: str = option("", "batch x tokens instead of all, such as 32x4096,1x8192")
    bits: str = option("", "of keys / of values instead of all, such as 4/4,3/2")
    only: tuple[str, ...] = option((), "implementations instead of all, and cudnn")
    sweep: tuple[str, ...] = option((), "schedules too: programs;pages;warps;stages")
    calls: int = option(8, "calls of a chain at least")
    turn: float = option(200.0, "megabytes of caches in turn, more than L2 holds")


SMOKE = Config(shapes="1x128", bits="4/4", calls=1, turn=0.1)


@functools.partial(jax.jit, static_argnums=4)
def attend(
    q: jax.Array,
    blocks: BlocksOperand,
    table: jax.Array,
    lengths: jax.Array,
    schedule: Schedule | None = None,
) -> jax.Array:
    """The kernel's output."""
    held = PagedBlocks((blocks,), table, lengths)
    return decode_attention(q, held, Softmax(SM_SCALE), schedule=schedule)[0]


@dataclass(frozen=True)
class Case:
    """A line to be measured; `code` and `schedule` are those of the kernel.

    `queries`: query heads of a kv head, those of as many new tokens as `newest` says. `least`:
    calls of a chain, and bytes that they read, at least.
    """

    name: str
    bits: tuple[float, float]
    shape: Pair
    schedule: Schedule | None = None
    code: CodeKind = "scalar"
    paged: bool = True
    mean: str = ""
    lengths: str = ""
    queries: int = GROUP
    newest: int = 1
    least: tuple[int, float] = (8, 200e6)

    @property
    def nbytes(self) -> float:
        """Bytes of keys and values, with scales where there are any."""
        batch, tokens = self.shape
        scales = {"cudnn": 0, "int8-xla": 8}.get(self.name, 4)
        return batch * tokens * KV_HEADS * (CHANNELS * sum(self.bits) / 8 + scales)

    @property
    def caches(self) -> int:
        """How many are read in turn."""
        return max(2, int(np.ceil(self.least[1] / self.nbytes)))

    @property
    def calls(self) -> int:
        """Of a chain: all caches in turn, and a few."""
        return max(self.least[0], self.caches)

    def step(self, q: jax.Array, *cache: Any) -> jax.Array:
        """A call."""
        if self.name == "cudnn":
            by_token = q.reshape(q.shape[0], self.newest, -1, CHANNELS)
            return vendor(by_token, *cache).reshape(q.shape)
        if self.name == "int8-xla":
            return int8_xla(q, *cache)
        if self.name in calibrated_blocks.MIXES:
            return attend_with_newest(q, *cache)
        if self.name == "pallas-exact":
            held = PagedBlocks((cache[0],), *cache[1:3])
            mean, phases = cache[3:]
            return attend_with_newest(q, held, mean, phases, self.schedule, self.newest)
        return attend(q, *cache, self.schedule)

    def chain(self, q: jax.Array, caches: list[tuple]) -> jax.Array:
        """Calls one after another, each with another cache."""
        for cache in itertools.islice(itertools.cycle(caches), self.calls):
            q = self.step(q, *cache)
        return q

    def make(self) -> tuple[jax.Array, list[tuple]]:
        """The first query, and caches that together are more than L2 holds."""
        exact = self.name == "pallas-exact"
        dtype = jnp.float32 if self.schedule and not exact else jnp.bfloat16
        q = jax.random.normal(
            jax.random.key(0), (self.shape[0], self.queries * KV_HEADS, CHANNELS), dtype
        )
        return q, [_cache(self, jax.random.key(i)) for i in range(self.caches)]


@functools.partial(jax.jit, static_argnums=0)
def _cache(case: Case, key: jax.Array) -> tuple:
    """Random keys and values; in pages that are shuffled if `paged`."""
    batch, tokens = case.shape
    keys = jax.random.split(key)
    if case.name == "cudnn":
        size = (batch, tokens, KV_HEADS, CHANNELS)
        return tuple(jax.random.normal(k, size, jnp.bfloat16) for k in keys)
    if case.name == "int8-xla":
        size = (batch, KV_HEADS, tokens, CHANNELS)
        bytes_of = (jax.random.bits(k, size, jnp.uint8).astype(jnp.int8) for k in keys)
        return (*bytes_of, jnp.full((2, batch, KV_HEADS, tokens), 0.01, jnp.float32))
    if case.lengths:
        return _unlike(case, *keys)
    pages = batch * tokens // PAGE
    order = jnp.arange(pages, dtype=jnp.int32)
    order = jax.random.permutation(keys[0], order) if case.paged else order
    if case.name in calibrated_blocks.MIXES:
        mix, table = calibrated_blocks.MIXES[case.name], order.reshape(batch, -1)
        held = calibrated_blocks.random_heads(keys[1], mix, table, tokens)
        return held, *means(case.mean, batch, tokens)
    bits = int(case.bits[0]), int(case.bits[1])
    blocks = random_blocks(keys[1], bits, pages, code=case.code)
    paged = blocks, order.reshape(batch, -1), jnp.full((batch,), tokens, jnp.int32)
    return (*paged, *means(case.mean, batch, tokens)) if case.name == "pallas-exact" else paged


def _unlike(case: Case, order: jax.Array, content: jax.Array) -> tuple:
    """The same for `case.lengths`."""
    batch, tokens = case.shape
    lengths = lengths_of(case.lengths, case.shape)
    most = batch * tokens // PAGE // 2 + 1  # of the long one
    held = -(-lengths // PAGE)
    pages = batch * tokens // PAGE + batch  # some end inside a block
    number = np.cumsum(held)[:, None] - held[:, None] + np.arange(most)[None, :]
    table = jax.random.permutation(order, jnp.arange(pages, dtype=jnp.int32))[number % pages]
    bits = int(case.bits[0]), int(case.bits[1])
    return random_blocks(content, bits, pages), table, jnp.asarray(lengths, jnp.int32)


def lengths_of(kind: str, shape: Pair) -> np.ndarray:
    """Tokens of each sequence; their sum is that of equal ones."""
    batch, tokens = shape
    if kind == "one long":
        lengths = np.full(batch, batch * tokens // 2 // (batch - 1))
        lengths[batch // 2] += batch * tokens - lengths.sum()
        return lengths
    if kind == "uniform":
        spread = np.floor(np.linspace(1 / 8, 15 / 8, batch) * tokens).astype(int)
        spread[-1] += batch * tokens - spread.sum()
        return np.random.default_rng(0).permutation(spread)
    return np.full(batch, tokens)


def compiled(case: Any) -> Callable[..., jax.Array] | Exception:
    """The `chain` of a case on what it `make`s, or why not: a schedule may not fit the device."""
    try:
        return jax.jit(case.chain).lower(*jax.eval_shape(case.make)).compile()
    except Exception as error:
        return error


def measure(case: Case, chain: Callable[..., jax.Array], copy: float, base: float) -> Row:
    """One measurement; `base` are the seconds of the baseline, NaN for the baseline itself."""
    s = case.schedule
    q, caches = case.make()
    time = device_time(lambda: chain(q, caches))
    took = time.busy / case.calls
    rate = case.nbytes / took
    return {
        "implementation": case.name,
        "bits_k": case.bits[0],
        "bits_v": case.bits[1],
        "batch": case.shape[0],
        "tokens": case.shape[1],
        "schedule": f"s{s.splits} p{s.pages} w{s.warps} st{s.stages}" if s else "",
        "milliseconds": took * 1e3,
        "span_milliseconds": time.span / case.calls * 1e3,
        "gigabytes_per_second": rate / 1e9,
        "fraction_of_copy_bandwidth": rate / copy,
        "speedup_over_cudnn": 1.0 if case.name == "cudnn" else base / took,
        "mean": case.mean,
        "queries": case.queries,
        "lengths": case.lengths,
    }


def cases_of(shape: Pair, bits: Sequence[Pair], sweep: Sequence[str]) -> list[Case]:
    """Baselines, then the kernel."""
    cases = [Case("cudnn", (16, 16), shape), Case("int8-xla", (8, 8), shape)]
    for pair in bits:
        schedules = [schedule_of(pair, shape)]
        for choices in sweep:
            schedules += sweep_schedules(shape, choices)
        cases += [Case("pallas", pair, shape, s) for s in dict.fromkeys(schedules)]
    if not sweep:
        schedule = schedule_of(bits[0], shape)
        cases.append(Case("pallas-dense", bits[0], shape, schedule, paged=False))
        for pair in TRELLIS_BITS:
            schedule = schedule_of(pair, shape, "trellis")
            cases.append(Case("pallas-trellis", pair, shape, schedule, "trellis"))
    return cases


def mean_cases() -> list[Case]:
    """4 bits with and without a mean; groups of 7 and 8 query heads as well."""
    settings = [(shape, 4) for shape in SHAPES[:3]] + [((8, 32768), n) for n in (7, 8)]
    cases = []
    for shape, queries in settings:
        cases.append(Case("cudnn", (16, 16), shape, queries=queries))
        cases += [Case("pallas-exact", (4, 4), shape, mean=m, queries=queries) for m in MEANS]
    return cases


def calibrated_cases(shapes: Sequence[Pair]) -> list[Case]:
    """Heads of several formats, in each code, and 2 bits of all heads beside them."""
    cases = []
    for shape in shapes:
        cases.append(Case("cudnn", (16, 16), shape))
        cases.append(Case("pallas-exact", (2, 2), shape, mean="pre_rope"))
        cases += [
            Case(name, mix.bits, shape, mean="pre_rope")
            for name, mix in calibrated_blocks.MIXES.items()
        ]
    return cases


def length_cases(shapes: Sequence[Pair], bits: Sequence[Pair]) -> list[Case]:
    """Batches of equal and of unlike lengths."""
    cases = []
    for shape in shapes:
        cases.append(Case("cudnn", (16, 16), shape))
        cases += [
            Case("pallas", pair, shape, schedule_of(pair, shape), lengths=kind)
            for pair in bits
            for kind in LENGTHS
        ]
    return cases


def run(config: Config, track: Track) -> Iterator[Row]:
    """Correctness first; what is measured is compiled ahead, several cases at a time."""
    shapes = pairs(config.shapes, "x") or list(SHAPES)
    bits: Sequence[Pair] = pairs(config.bits, "/") or BITS
    cases = [case for shape in shapes for case in cases_of(shape, bits, config.sweep)]
    if config.cases == "mean":
        bits, cases = ((4, 4),), mean_cases()
    if config.cases == "calibrated":
        bits, cases = ((2, 2),), calibrated_cases(pairs(config.shapes, "x") or SHAPES[:2])
    if config.cases == "lengths":
        bits = pairs(config.bits, "/") or ((4, 4), (2, 2))
        cases = length_cases(pairs(config.shapes, "x") or SHAPES[:2], bits)
    names = {*config.only, "cudnn"} if config.only else {case.name for case in cases}
    cases = [case for case in cases if case.name in names]
    least = config.calls, config.turn * 1e6
    cases = [dataclasses.replace(case, least=least) for case in cases]
    codes: list[tuple[Pair, Code]] = [(pair, "scalar") for pair in (*bits, (1, 1), (8, 5))]
    codes += [(pair, "trellis") for pair in TRELLIS_BITS]
    checks = [partial(check, cache_config(1, pair, code=code)) for pair, code in codes]
    if config.cases == "lengths":
        checks = [partial(check, cache_config(1, pair)) for pair in bits]
    if config.cases == "calibrated":
        checks = [
            partial(check, calibrated_blocks.config_of(mix), calibrated_blocks.calibration())
            for name, mix in calibrated_blocks.MIXES.items()
            if name in names
        ]
    alike = [dataclasses.replace(c, lengths=c.lengths and LENGTHS[0]) for c in cases]  # programs
    with ThreadPoolExecutor() as pool:
        programs = list(dict.fromkeys(alike))
        chains = pool.map(compiled, programs)
        list(pool.map(lambda run: run(), checks))
        made = dict(zip(programs, chains, strict=True))
        ready = [made[case] for case in alike]
    copy, bases = copy_bandwidth(), dict[Any, float]()
    for case, chain in track(list(zip(cases, ready, strict=True)), "decode_speed"):
        if isinstance(chain, Exception):
            print(f"{case} failed: {str(chain)[:200]}", flush=True)
            continue
        row = measure(case, chain, copy, bases.get((case.shape, case.queries), float("nan")))
        if case.name == "cudnn":
            bases[case.shape, case.queries] = row["milliseconds"] / 1e3
        yield row


claims = speed_claims.decode
