"""What compression costs while a prompt is read, against cuDNN on bf16 alone.

`python -m experiments.speed.prefill_speed --out DIR` on a GPU writes DIR/rows.csv, prints a table.
One attention layer of an 8B model (32 query and 8 kv heads of 128 channels), one sequence.

    whole     a prompt in one chunk: attention over itself, then compression
    chunked   a prompt in chunks of 8,192: each attends to itself and to the compressed past

The baseline is cuDNN over the same queries and keys, full-precision past included, without the
merge of the two that a caller would need. Times are those of the device by the profiler, medians
over repetitions of one compiled call: `milliseconds` from its first kernel to its last,
`busy_milliseconds` without the gaps between kernels; `ratio_to_cudnn` is of the former.
`peak_ratio`: what the compiled call needs, arguments and temporaries, over what cannot be less, the
cache (of all 32 layers), the prompt's queries, keys and values, and a chunk's copies and outputs.

`mean`: of the keys, "stored" or "pre_rope", where both were measured; "stored" where it is empty.

Rows labelled `before` are of an earlier form of chunks, with one length of tile for all heads, by a
host clock.
"""

import argparse
import dataclasses
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

from experiments.harness.results import write_table
from experiments.speed.device_time import device_time
from turboquant_jax import cache
from turboquant_jax.attention import attend_and_write

HEADS, KV_HEADS, CHANNELS, LAYERS = 32, 8, 128, 32
WHOLE, LONG, CHUNK = (32768, 8192), 131072, 8192
Kind = tuple[int, str]  # bits, mean
BITS = (4, 3, 2)
FREQUENCIES = tuple(5e5 ** -(i / (CHANNELS // 2)) for i in range(CHANNELS // 2))


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of rows.csv."""

    setting: str
    bits: int
    tokens: int
    milliseconds: float
    busy_milliseconds: float
    ratio_to_cudnn: float
    peak_ratio: float
    mean: str = ""


def random(seed: int, tokens: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """bf16 queries, keys and values of one sequence."""
    keys = jax.random.split(jax.random.key(seed), 3)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    make = jax.jit(jax.random.normal, static_argnums=(1, 2))
    q, k, v = (
        make(key, (1, tokens, n, CHANNELS), jnp.bfloat16)
        for key, n in zip(keys, heads, strict=True)
    )
    return q, k, v


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> jax.Array:
    """The vendor's attention."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")


def plain(chunk: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Every chunk over itself, and over everything before it."""
    out = jnp.zeros((), jnp.float32)
    for start in range(0, q.shape[1], chunk):
        here = slice(start, start + chunk)
        own = cudnn(q[:, here], k[:, here], v[:, here], True)
        out = out + own[0, -1, 0, 0].astype(jnp.float32)
        if start:
            past = cudnn(q[:, here], k[:, :start], v[:, :start], False)
            out = out + past[0, -1, 0, 0].astype(jnp.float32)
    return out


def compressed(
    state: cache.Cache, chunk: int, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[cache.Cache, jax.Array]:
    """The same through the first layer of a cache that is empty."""

    def step(state: cache.Cache, start: jax.Array) -> tuple[cache.Cache, jax.Array]:
        here = [lax.dynamic_slice_in_dim(x, start, chunk, axis=1) for x in (q, k, v)]
        state = cache.begin(state, jnp.full(1, chunk, jnp.int32), chunk)
        out, state = attend_and_write(state, 0, *here)
        return cache.commit(state), out[0, -1, 0, 0]

    nothing = jnp.zeros(1, jnp.int32)
    state = state.with_table(lengths=nothing, overflow=nothing > 0)
    state, outs = lax.scan(step, state, jnp.arange(0, q.shape[1], chunk))
    return state, outs.astype(jnp.float32).sum()


def create(bits: int, layers: int, tokens: int, mean: str) -> cache.Cache:
    """An empty cache."""
    codec = cache.CodecConfig(bits)
    turned = FREQUENCIES if mean == "pre_rope" else None
    config = cache.CacheConfig(layers, KV_HEADS, CHANNELS, codec, codec, rope_frequencies=turned)
    return jax.jit(lambda: cache.create(config, 1, tokens, key=jax.random.key(0)))()


def build(
    kind: Kind, chunk: int, layers: int, qkv: tuple[jax.Array, ...]
) -> tuple[cache.Cache, jax.stages.Compiled]:
    """An empty cache, and what reads a prompt into it."""
    bits, mean = kind
    state = create(bits, layers, qkv[0].shape[1], mean)
    run = jax.jit(compressed, static_argnums=1, donate_argnums=0)
    return state, run.lower(state, chunk, *qkv).compile()


def measure(
    kinds: Sequence[Kind], setting: str, tokens: int, chunk: int, layers: int, repetitions: int
) -> Iterator[Row]:
    """The baseline and every number of bits."""
    qkv = random(1, tokens)
    run_plain = jax.jit(plain, static_argnums=0)
    base = device_time(lambda: run_plain(chunk, *qkv), repetitions)
    times = base.span * 1e3, base.busy * 1e3
    yield show(Row(f"{setting}: cudnn", 16, tokens, *times, 1.0, float("nan")))
    with ThreadPoolExecutor() as pool:  # compiled side by side, run one by one
        built = list(pool.map(lambda kind: build(kind, chunk, layers, qkv), kinds))
    for (bits, mean), (state, run) in zip(kinds, built, strict=True):
        size, prompt = state.nbytes, sum(x.nbytes for x in qkv)

        def once(run=run) -> jax.Array:
            nonlocal state
            state, out = run(state, *qkv)
            return out

        took = device_time(once, repetitions)
        times = took.span * 1e3, took.busy * 1e3
        held = size + 4 * chunk * CHANNELS * (HEADS + KV_HEADS) + prompt
        memory = run.memory_analysis()
        assert memory is not None  # it is known on a GPU
        peak = memory.temp_size_in_bytes + size + prompt
        ratio = took.span / base.span
        yield show(Row(f"{setting}: compressed", bits, tokens, *times, ratio, peak / held, mean))


def show(row: Row) -> Row:
    """One line, and the row."""
    print(
        f"{row.setting:22s} {row.bits:2d} bits {row.mean:8s} "
        f"{row.tokens:6d} tokens {row.milliseconds:9.2f} ms "
        f"({row.busy_milliseconds:.2f} busy) {row.ratio_to_cudnn:6.3f}x cudnn, "
        f"peak {row.peak_ratio:5.3f}",
        flush=True,
    )
    return row


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--cases", choices=("all", "mean"), default="all")
    arguments = parser.parse_args()
    rows, start = [], time.monotonic()
    whole = [("whole", tokens, tokens, 1, 2 * arguments.repetitions) for tokens in WHOLE]
    cases = [*whole, ("chunked", LONG, CHUNK, LAYERS, arguments.repetitions)]
    kinds: list[Kind] = [(bits, "") for bits in BITS]
    if arguments.cases == "mean":
        cases, kinds = whole[:1], [(4, "stored"), (4, "pre_rope")]
    for case in cases:
        for row in measure(kinds, *case):
            rows.append(row)
            write_table(arguments.out, rows, time.monotonic() - start)


if __name__ == "__main__":
    main()
