"""What one step of decoding costs around the kernel: a layer's attention, and its append.

`python -m experiments.step_speed --out DIR` on a GPU: writes DIR/rows.csv and prints a table. One
layer of a cache (32 query and 8 kv heads of 128 channels), one new token per sequence:

    blocks    the fused kernel over the compressed blocks, queries already rotated
    attend    rotate, blocks, sinks, window and the new token, merge, un-rotate
    step      begin, attend, write, commit: everything, allocation and compression included

Each is a chain under `lax.fori_loop` in which a step's output is the next one's query, so that the
host takes no part; a time is the median over chains. The cache is larger than L2.
"""

import argparse
import csv
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

from turboquant_jax import attention, cache, fused
from turboquant_jax.cache import Cache, CacheConfig, CodecConfig

SHAPES = ((8, 32768), (32, 4096))
BITS = (4, 3, 2)
HEADS, KV_HEADS, CHANNELS = 32, 8, 128
STEPS = 256


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of rows.csv."""

    part: str
    bits: int
    batch: int
    tokens: int
    milliseconds: float
    ratio_to_blocks: float


def filled(bits: int, batch: int, tokens: int) -> Cache:
    """A cache of `tokens` random tokens a sequence: random codes, plausible scales."""
    codec = CodecConfig(bits)
    config = CacheConfig(1, KV_HEADS, CHANNELS, codec, codec)
    state = cache.create(config, batch, tokens + 40 * STEPS, key=jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    codes = jax.tree.map(
        lambda x: jax.random.bits(next(keys), x.shape, x.dtype),
        (state.pool.keys, state.pool.values),
    )
    scales = jax.tree.map(lambda x: jnp.full_like(x, 0x3F803F80), state.pool.scales)  # 1.0, 1.0
    window = jax.tree.map(
        lambda x: jax.random.normal(next(keys), x.shape, x.dtype), (state.sinks, state.window)
    )
    return dataclasses.replace(
        state,
        pool=dataclasses.replace(state.pool, keys=codes[0], values=codes[1], scales=scales),
        sinks=window[0],
        window=window[1],
        lengths=jnp.full(batch, tokens, jnp.int32),
    )


def check(bits: int) -> float:
    """Relative error of attention by the kernel against the definition, on the device."""
    state = filled(bits, 3, 1000)
    q = jax.random.normal(jax.random.key(2), (3, 1, HEADS, CHANNELS))
    k, v = jax.random.normal(jax.random.key(3), (2, 3, 1, KV_HEADS, CHANNELS))
    got, want = (
        jax.jit(attention.attend, static_argnames="implementation")(
            state, 0, q, k, v, implementation=name
        )
        for name in ("pallas", "xla")
    )
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


def blocks(state: Cache, q: jax.Array, new: jax.Array) -> tuple[Cache, jax.Array]:
    """The kernel alone."""
    out, _ = fused.attend_blocks(
        state, jnp.int32(0), q[:, 0], scale=CHANNELS**-0.5, softcap=None, bias=None
    )
    return state, out[:, None]


def attend(state: Cache, q: jax.Array, new: jax.Array) -> tuple[Cache, jax.Array]:
    """A layer's attention."""
    return state, attention.attend(state, 0, q, *new, implementation="pallas")


def step(state: Cache, q: jax.Array, new: jax.Array) -> tuple[Cache, jax.Array]:
    """Attention and append, with what a model does once for all layers."""
    state = cache.begin(state, jnp.ones_like(state.lengths), 1)
    out = attention.attend(state, 0, q, *new, implementation="pallas")
    return cache.commit(cache.write(state, 0, *new)), out


def seconds(part: Callable, state: Cache, q: jax.Array, new: jax.Array) -> float:
    """Median time of one step in chains of STEPS; the cache is donated from chain to chain."""

    def chain(state: Cache, q: jax.Array) -> tuple[Cache, jax.Array]:
        return lax.fori_loop(0, STEPS, lambda _, carry: part(*carry, new), (state, q))

    run = jax.jit(chain, donate_argnums=0)
    times = []
    for _ in range(8):
        begin = time.perf_counter()
        state, out = run(state, q)
        out.block_until_ready()
        times.append((time.perf_counter() - begin) / STEPS)
    return statistics.median(times[1:])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    rows = []
    for bits in BITS:
        error = check(bits)
        print(f"check {bits} bits: relative error {error:.1e}", flush=True)
        if not error < 5e-3:
            raise ValueError(f"got relative error {error} at {bits} bits, expected below 5e-3")
    for batch, tokens in SHAPES:
        q = jax.random.normal(jax.random.key(4), (batch, 1, HEADS, CHANNELS))
        new = jax.random.normal(jax.random.key(5), (2, batch, 1, KV_HEADS, CHANNELS))
        for bits in BITS:
            base = None
            for part in (blocks, attend, step):
                took = seconds(part, filled(bits, batch, tokens), q, new)
                base = took if base is None else base
                rows.append(Row(part.__name__, bits, batch, tokens, took * 1e3, took / base))
                print(
                    f"{part.__name__:7s} {bits} bits {batch:3d} x {tokens:<6d} {took * 1e6:8.1f} us"
                    f" {took / base:5.2f}x the kernel",
                    flush=True,
                )
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "rows.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in dataclasses.fields(Row)])
        writer.writerows(dataclasses.astuple(row) for row in rows)


if __name__ == "__main__":
    main()
