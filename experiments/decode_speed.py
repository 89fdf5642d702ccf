"""How fast decode attention reads a compressed cache, against cuDNN on bf16.

`python -m experiments.decode_speed --out DIR` on a GPU: writes DIR/rows.csv and prints a table.
One new token per sequence, 32 query and 8 kv heads of 128 channels. A call's output is the next
call's query; the calls of a chain read different caches, which together are larger than L2. Times
are those of the device by the profiler, medians over chains: `milliseconds` the sum of all kernels
of a call, `span_milliseconds` with the gaps between them, which a chain of kernels that are shorter
than their launches has. Bytes are those of the packed cache (codes and scales).
"""

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.decode_blocks import (
    CHANNELS,
    KV_HEADS,
    PAGE,
    QUERY_HEADS,
    SM_SCALE,
    Pair,
    definition,
    random_blocks,
)
from experiments.device_time import DeviceTime, copy_bandwidth, device_time
from experiments.results import write_table
from pallas_kernels.decode_attention import Blocks, Schedule, decode_attention
from pallas_kernels.schedule import default_schedule

SHAPES = ((32, 4096), (8, 32768), (1, 131072), (1, 8192))
BITS = ((4, 4), (3, 3), (2, 2), (4, 3), (3, 2))
# More than the 50 MB of an H100's L2 several times over.
BYTES_IN_TURN = 200e6
CALLS = 8


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


def check(bits: Pair, schedule: Schedule | None = None) -> float:
    """Relative error of the output norm, random pages and lengths that end inside a block."""
    blocks = random_blocks(jax.random.key(7), bits, 64)
    table = jax.random.permutation(jax.random.key(8), 64)[:48].reshape(3, 16)
    lengths = jnp.array([1024, 777, 65], jnp.int32)
    q = 2.0 * jax.random.normal(jax.random.key(9), (3, QUERY_HEADS, CHANNELS))
    got = attend(q, blocks, table, lengths, schedule)
    want = jax.jit(definition)(q, blocks, table, lengths)
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


@functools.partial(jax.jit, static_argnums=4)
def attend(
    q: jax.Array,
    blocks: Blocks,
    table: jax.Array,
    lengths: jax.Array,
    schedule: Schedule | None = None,
) -> jax.Array:
    """The kernel's output."""
    return decode_attention(q, (blocks,), table, lengths, sm_scale=SM_SCALE, schedule=schedule)[0]


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


def measure(
    step: Callable[..., jax.Array], q: jax.Array, caches: list[tuple], calls: int
) -> DeviceTime:
    """Of one call in a chain."""
    step = jax.jit(step)

    @jax.jit
    def chain(q: jax.Array, caches: list[tuple]) -> jax.Array:
        for cache in itertools.islice(itertools.cycle(caches), calls):
            q = step(q, *cache)
        return q

    took = device_time(lambda: chain(q, caches))
    return DeviceTime(took.busy / calls, took.span / calls)


class Bench:
    """Measures and keeps rows; the baseline of a shape comes first."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.start = time.monotonic()
        self.cudnn: dict[Pair, float] = {}
        self.copy = copy_bandwidth()
        device = jax.devices()[0].device_kind
        print(f"{device}, jax {jax.__version__}, copy {self.copy / 1e9:.0f} GB/s")

    def add(
        self, name: str, bits: Pair, shape: Pair, schedule: str, nbytes: float, time: DeviceTime
    ) -> None:
        """Keeps and prints one measurement."""
        took = time.busy
        rate, base = nbytes / took, self.cudnn.get(shape, float("nan"))
        row = Row(
            name, *bits, *shape, schedule, took * 1e3, time.span * 1e3, rate / 1e9,
            rate / self.copy, base / took,
        )  # fmt: skip
        self.rows.append(row)
        print(
            f"{name:12s} {bits[0]}/{bits[1]:<2d} {shape[0]:3d} x {shape[1]:<6d} {schedule:16s} "
            f"{took * 1e6:8.1f} us (span {time.span * 1e6:.1f}) {rate / 1e9:6.0f} GB/s "
            f"{rate / self.copy:5.2f} of copy {base / took:5.2f}x",
            flush=True,
        )

    def baselines(self, shape: Pair) -> None:
        """cuDNN in bf16 and an int8 cache through XLA."""
        batch, tokens = shape
        q = jax.random.normal(jax.random.key(0), (batch, QUERY_HEADS, CHANNELS), jnp.bfloat16)
        nbytes = batch * tokens * KV_HEADS * CHANNELS * 4
        count = max(2, int(np.ceil(BYTES_IN_TURN / nbytes)))
        normal = jax.jit(jax.random.normal, static_argnums=(1, 2))
        size = (batch, tokens, KV_HEADS, CHANNELS)
        caches = [
            tuple(normal(jax.random.key(2 * i + j), size, jnp.bfloat16) for j in range(2))
            for i in range(count)
        ]
        took = measure(cudnn, q, caches, max(count, CALLS))
        self.cudnn[shape] = took.busy
        self.add("cudnn", (16, 16), shape, "", nbytes, took)
        size = (batch, KV_HEADS, tokens, CHANNELS)
        scales = jnp.full((2, batch, KV_HEADS, tokens), 0.01, jnp.float32)
        narrow = jax.jit(lambda key: jax.random.bits(key, size, jnp.uint8).astype(jnp.int8))
        caches8 = [
            (*(narrow(jax.random.key(2 * i + j)) for j in range(2)), scales) for i in range(count)
        ]
        took = measure(int8_xla, q, caches8, max(count, CALLS))
        self.add("int8-xla", (8, 8), shape, "", nbytes / 2 + scales.nbytes, took)

    def kernel(
        self,
        bits: Pair,
        shape: Pair,
        schedules: Sequence[Schedule],
        name: str = "pallas",
        paged: bool = True,
    ) -> None:
        """The fused kernel, once per schedule; `paged` shuffles the pages."""
        batch, tokens = shape
        pages = batch * tokens // PAGE
        nbytes = batch * tokens * KV_HEADS * (CHANNELS * sum(bits) / 8 + 4)
        count = max(2, int(np.ceil(BYTES_IN_TURN / nbytes)))
        make = jax.jit(random_blocks, static_argnums=(1, 2))
        lengths = jnp.full((batch,), tokens, jnp.int32)
        caches: list[Any] = []
        for i in range(count):
            order = jnp.arange(pages)
            order = jax.random.permutation(jax.random.key(i), pages) if paged else order
            table = order.reshape(batch, -1).astype(jnp.int32)
            caches.append((make(jax.random.key(i), bits, pages), table, lengths))
        q = jax.random.normal(jax.random.key(0), (batch, QUERY_HEADS, CHANNELS), jnp.float32)
        for s in schedules:
            step = functools.partial(attend, schedule=s)
            label = f"s{s.splits} p{s.pages} w{s.warps} st{s.stages}"
            try:
                took = measure(step, q, caches, max(count, CALLS))
            except Exception as error:  # a schedule may not fit the device: the others go on
                print(f"{name} {bits} {shape} {label} failed: {str(error)[:200]}", flush=True)
                continue
            self.add(name, bits, shape, label, nbytes, took)

    def write(self, out: Path) -> None:
        """DIR/rows.csv and DIR/meta.json."""
        write_table(out, self.rows, time.monotonic() - self.start)


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


def run(out: Path, shapes: Sequence[Pair], bits: Sequence[Pair], sweep: Sequence[str]) -> None:
    """Correctness first, then baselines, then the kernel."""
    for pair in (*bits, (1, 1), (8, 5)):
        error = check(pair)
        print(f"check {pair}: relative error {error:.1e}", flush=True)
        if not error < 5e-3:
            raise ValueError(f"got relative error {error} at {pair} bits, expected less than 5e-3")
    bench = Bench()
    for shape in shapes:
        bench.baselines(shape)
        for pair in bits:
            schedules = [schedule_of(pair, shape)]
            for choices in sweep:
                schedules += sweep_schedules(shape, choices)
            bench.kernel(pair, shape, list(dict.fromkeys(schedules)))
            bench.write(out)
        if not sweep:
            bench.kernel(
                bits[0], shape, [schedule_of(bits[0], shape)], name="pallas-dense", paged=False
            )
    bench.write(out)


def pairs_of(text: str, mark: str) -> list[Pair]:
    """'32x4096,1x8192' -> [(32, 4096), (1, 8192)]."""
    split = [part.split(mark) for part in text.split(",")]
    return [(int(first), int(second)) for first, second in split]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", default="", help="such as 32x4096,1x8192")
    parser.add_argument("--bits", default="", help="such as 4/4,3/2")
    parser.add_argument("--sweep", action="append", default=[], help="programs;pages;warps;stages")
    a = parser.parse_args()
    run(
        a.out,
        pairs_of(a.shapes, "x") if a.shapes else SHAPES,
        pairs_of(a.bits, "/") if a.bits else BITS,
        a.sweep,
    )


if __name__ == "__main__":
    main()
