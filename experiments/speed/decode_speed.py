"""How fast decode attention reads a compressed cache, against cuDNN on bf16.

`python -m experiments.speed.decode_speed --out DIR` on a GPU writes DIR/rows.csv, prints a table.
One new token per sequence, 32 query and 8 kv heads of 128 channels. A call's output is the next
call's query; the calls of a chain read different caches, which together are larger than L2. Times
are those of the device by the profiler, medians over chains: `milliseconds` the sum of all kernels
of a call, `span_milliseconds` with the gaps between them, which a chain of kernels that are shorter
than their launches has. Bytes are those of the packed cache (codes and scales).

`pallas-exact` sees one newest token in full precision too, as a mean of the keys needs: `mean`
is "" for none, "stored" or "pre_rope". `queries`: query heads a kv head, 4 where it is empty.

Rows labelled `queued` are of an earlier kernel, by a host clock over queued chains of calls.
"""

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness.results import write_table
from experiments.speed.decode_blocks import (
    CHANNELS,
    KV_HEADS,
    PAGE,
    QUERY_HEADS,
    SM_SCALE,
    Pair,
    attend_with_newest,
    definition,
    means,
    random_blocks,
)
from experiments.speed.device_time import copy_bandwidth, device_time
from pallas_kernels.decode_attention import (
    BlocksOperand,
    PagedBlocks,
    Schedule,
    Softmax,
    decode_attention,
    default_schedule,
)
from pallas_kernels.primitives.codebook import CodeKind

SHAPES = ((32, 4096), (8, 32768), (1, 131072), (1, 8192))
BITS = ((4, 4), (3, 3), (2, 2), (4, 3), (3, 2))
# Of trellis codes: the presets'.
TRELLIS_BITS = ((3, 3), (3, 2), (2, 2))
MEANS = ("", "stored", "pre_rope")
# More than the 50 MB of an H100's L2 several times over; calls of a chain at least.
BYTES_IN_TURN, CALLS = 200e6, 8


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of rows.csv."""

    implementation: str
    bits_k: int
    bits_v: int
    batch: int
    tokens: int
    schedule: str
    milliseconds: float
    span_milliseconds: float
    gigabytes_per_second: float
    fraction_of_copy_bandwidth: float
    speedup_over_cudnn: float
    mean: str = ""
    queries: int = QUERY_HEADS // KV_HEADS


def check(bits: Pair, schedule: Schedule | None = None, code: CodeKind = "scalar") -> float:
    """Relative error of the output norm, random pages and lengths that end inside a block."""
    blocks = random_blocks(jax.random.key(7), bits, 64, code=code)
    table = jax.random.permutation(jax.random.key(8), 64)[:48].reshape(3, 16)
    lengths = jnp.array([1024, 777, 65], jnp.int32)
    q = 2.0 * jax.random.normal(jax.random.key(9), (3, QUERY_HEADS, CHANNELS))
    got = attend(q, blocks, table, lengths, schedule)
    want = jax.jit(definition)(q, blocks, table, lengths)
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


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


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """bf16 q [B, N, H], k and v [B, S, K, H]."""
    attention = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    return attention(q[:, None], k, v, scale=SM_SCALE)[:, 0]


def int8_xla(q: jax.Array, k: jax.Array, v: jax.Array, scales: jax.Array) -> jax.Array:
    """An int8 cache [B, K, S, H] with float32 scales [2, B, K, S], left to XLA."""
    split = q.reshape(q.shape[0], KV_HEADS, -1, CHANNELS)
    score = jnp.einsum("bkgh,bksh->bkgs", split, k.astype(jnp.bfloat16)).astype(jnp.float32)
    share = jax.nn.softmax(score * scales[0][:, :, None, :] * SM_SCALE, axis=-1)
    share = (share * scales[1][:, :, None, :]).astype(jnp.bfloat16)
    return jnp.einsum("bkgs,bksh->bkgh", share, v.astype(jnp.bfloat16)).reshape(q.shape)


@dataclasses.dataclass(frozen=True)
class Case:
    """A line to be measured; `code` and `schedule` are those of the kernel."""

    name: str
    bits: Pair
    shape: Pair
    schedule: Schedule | None = None
    code: CodeKind = "scalar"
    paged: bool = True
    mean: str = ""
    queries: int = QUERY_HEADS // KV_HEADS

    @property
    def nbytes(self) -> float:
        """Bytes of keys and values, with scales where there are any."""
        batch, tokens = self.shape
        scales = {"cudnn": 0, "int8-xla": 8}.get(self.name, 4)
        return batch * tokens * KV_HEADS * (CHANNELS * sum(self.bits) / 8 + scales)

    @property
    def calls(self) -> int:
        """Of a chain: all caches in turn, and a few."""
        return max(CALLS, int(np.ceil(BYTES_IN_TURN / self.nbytes)))

    def step(self, q: jax.Array, *cache: Any) -> jax.Array:
        """A call."""
        if self.name == "cudnn":
            return cudnn(q, *cache)
        if self.name == "int8-xla":
            return int8_xla(q, *cache)
        if self.name == "pallas-exact":
            return attend_with_newest(q, PagedBlocks((cache[0],), *cache[1:3]), *cache[3:])
        return attend(q, *cache, self.schedule)

    def chain(self, q: jax.Array, caches: list[tuple]) -> jax.Array:
        """Calls one after another, each with another cache."""
        for cache in itertools.islice(itertools.cycle(caches), self.calls):
            q = self.step(q, *cache)
        return q

    def make(self) -> tuple[jax.Array, list[tuple]]:
        """The first query, and caches that together are more than L2 holds."""
        count = max(2, int(np.ceil(BYTES_IN_TURN / self.nbytes)))
        dtype = jnp.float32 if self.schedule else jnp.bfloat16
        q = jax.random.normal(
            jax.random.key(0), (self.shape[0], self.queries * KV_HEADS, CHANNELS), dtype
        )
        return q, [_cache(self, jax.random.key(i)) for i in range(count)]


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
        codes = (jax.random.bits(k, size, jnp.uint8).astype(jnp.int8) for k in keys)
        return (*codes, jnp.full((2, batch, KV_HEADS, tokens), 0.01, jnp.float32))
    pages = batch * tokens // PAGE
    order = jnp.arange(pages, dtype=jnp.int32)
    order = jax.random.permutation(keys[0], order) if case.paged else order
    blocks = random_blocks(keys[1], case.bits, pages, code=case.code)
    held = blocks, order.reshape(batch, -1), jnp.full((batch,), tokens, jnp.int32)
    return (*held, *means(case.mean, batch, tokens)) if case.name == "pallas-exact" else held


def compiled(case: Case) -> Callable[..., jax.Array] | Exception:
    """The chain of a case, or why there is none: a schedule may not fit the device."""
    try:
        return jax.jit(case.chain).lower(*jax.eval_shape(case.make)).compile()
    except Exception as error:
        return error


class Bench:
    """Measures and keeps rows; the baseline of a shape comes first."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.start = time.monotonic()
        self.cudnn: dict[tuple[Pair, int], float] = {}
        self.copy = copy_bandwidth()
        device = jax.devices()[0].device_kind
        print(f"{device}, jax {jax.__version__}, copy {self.copy / 1e9:.0f} GB/s")

    def measure(self, case: Case, chain: Callable[..., jax.Array] | Exception) -> None:
        """Keeps and prints one measurement."""
        s = case.schedule
        label = f"s{s.splits} p{s.pages} w{s.warps} st{s.stages}" if s else ""
        if isinstance(chain, Exception):
            print(f"{case.name} {case.bits} {case.shape} {label} failed: {str(chain)[:200]}")
            return
        q, caches = case.make()
        time = device_time(lambda: chain(q, caches))
        took, span = time.busy / case.calls, time.span / case.calls
        if case.name == "cudnn":
            self.cudnn[case.shape, case.queries] = took
        rate, base = case.nbytes / took, self.cudnn.get((case.shape, case.queries), float("nan"))
        row = Row(
            case.name, *case.bits, *case.shape, label, took * 1e3, span * 1e3, rate / 1e9,
            rate / self.copy, base / took, case.mean, case.queries,
        )  # fmt: skip
        self.rows.append(row)
        print(
            f"{case.name:14s} {case.bits[0]}/{case.bits[1]:<2d} {case.shape[0]:3d} x "
            f"{case.shape[1]:<6d} {case.queries} {case.mean or label:16s} "
            f"{took * 1e6:8.1f} us (span {span * 1e6:.1f}) "
            f"{rate / 1e9:6.0f} GB/s {rate / self.copy:5.2f} of copy {base / took:5.2f}x",
            flush=True,
        )


def schedule_of(bits: Pair, shape: Pair) -> Schedule:
    """What the kernel chooses by itself."""
    return default_schedule(
        batch=shape[0],
        kv_heads=KV_HEADS,
        heads=QUERY_HEADS // KV_HEADS,
        channels=CHANNELS,
        bits=max(bits),
        tokens=PAGE,
        max_pages=shape[1] // PAGE,
    )


def sweep_schedules(shape: Pair, choices: str) -> list[Schedule]:
    """'512,1024;1,2;2;3': programs; pages; warps; stages."""
    programs, pages, warps, stages = (
        [int(x) for x in part.split(",")] for part in choices.split(";")
    )
    batch, tokens = shape
    found = []
    for p, w, st, n in itertools.product(pages, warps, stages, programs):
        splits = max(1, min(n // (batch * KV_HEADS), tokens // (PAGE * p)))
        found.append(Schedule(splits=splits, pages=p, warps=w, stages=st))
    return list(dict.fromkeys(found))


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
            schedule = schedule_of(pair, shape)
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


def run(out: Path, bits: Sequence[Pair], cases: Sequence[Case]) -> None:
    """Correctness first; what is measured is compiled ahead, several cases at a time."""
    checks: list[tuple[Pair, CodeKind]] = [(pair, "scalar") for pair in (*bits, (1, 1), (8, 5))]
    checks += [(pair, "trellis") for pair in TRELLIS_BITS]
    with ThreadPoolExecutor() as pool:
        errors = pool.map(lambda job: check(job[0], code=job[1]), checks)
        chains = pool.map(compiled, cases)
        for (pair, code), error in zip(checks, errors, strict=True):
            print(f"check {pair} {code}: relative error {error:.1e}", flush=True)
            if not error < 5e-3:
                raise ValueError(f"got relative error {error} at {pair} bits, expected below 5e-3")
        ready = list(chains)
    bench = Bench()
    for case, chain in zip(cases, ready, strict=True):
        bench.measure(case, chain)
        write_table(out, bench.rows, time.monotonic() - bench.start)


def pairs_of(text: str, mark: str) -> list[Pair]:
    """'32x4096,1x8192' -> [(32, 4096), (1, 8192)]."""
    split = [part.split(mark) for part in text.split(",")]
    return [(int(first), int(second)) for first, second in split]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", choices=("all", "mean"), default="all")
    parser.add_argument("--shapes", default="", help="such as 32x4096,1x8192")
    parser.add_argument("--bits", default="", help="such as 4/4,3/2")
    parser.add_argument("--sweep", action="append", default=[], help="programs;pages;warps;stages")
    a = parser.parse_args()
    if a.cases == "mean":
        return run(a.out, ((4, 4),), mean_cases())
    shapes = pairs_of(a.shapes, "x") if a.shapes else SHAPES
    bits = pairs_of(a.bits, "/") if a.bits else BITS
    run(a.out, bits, [case for shape in shapes for case in cases_of(shape, bits, a.sweep)])


if __name__ == "__main__":
    main()
