"""How fast keys and values are compressed, against the copy bandwidth of the same run.

`python -m experiments.encode_speed --out DIR` on a GPU: writes DIR/rows.csv and prints a table. One
layer's keys and values in bfloat16, 8 kv heads of 128 channels, become packed blocks of 64 tokens.
Bytes are those read and written. Calls follow each other in a loop on the device; a time is the
median over loops. The vectors are more than L2 holds. `codes_apart` is the part of all codes that
differ from the definition's, by rounding at a threshold.
"""

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

from experiments.results import write_table
from turboquant_jax import cache
from turboquant_jax.cache import blocks, encoding
from turboquant_jax.cache.state import Exact
from turboquant_jax.llama.timing import copy_bandwidth

KV_HEADS, CHANNELS, BLOCK = 8, 128, 64
CASES = (
    *((bits, "hadamard", "least_squares", True) for bits in (4, 3, 2, 1, 5, 8)),
    (4, "hadamard", "least_squares", False),
    (4, "haar", "least_squares", True),
    (4, "hadamard", "norm", True),
    (4, "hadamard", "unbiased", True),
)
TOKENS = (32768, 131072)
CALLS = 20


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of rows.csv."""

    implementation: str
    bits: int
    rotation: str
    scale: str
    centred: bool
    tokens: int
    milliseconds: float
    gigabytes_per_second: float
    fraction_of_copy_bandwidth: float
    codes_apart: float


def empty(bits: int, rotation, scale, centred: bool, tokens: int) -> cache.Cache:
    """A cache of one layer and one sequence."""
    codec = cache.CodecConfig(bits, rotation, scale=scale)
    config = cache.CacheConfig(
        1, KV_HEADS, CHANNELS, codec, codec, block=BLOCK, window=0, sinks=0, center_keys=centred
    )
    return cache.create(config, 1, tokens, key=jax.random.key(0))


def vectors(tokens: int) -> Exact:
    """Normal keys with an offset, and normal values."""
    shape = (1, tokens, KV_HEADS, CHANNELS)
    keys, values = jax.random.normal(jax.random.key(1), (2, *shape))
    offset = 2 * jax.random.normal(jax.random.key(2), (1, 1, KV_HEADS, CHANNELS))
    return Exact((keys + offset).astype(jnp.bfloat16), values.astype(jnp.bfloat16))


def jobs(tokens: int) -> jax.Array:
    """Every block, none of which opens the mean."""
    block = jnp.arange(tokens // BLOCK, dtype=jnp.int32)
    zero = jnp.zeros_like(block)
    return jnp.stack([zero, BLOCK * block, block, zero, zero], axis=1)


def by_kernel(state: cache.Cache, source: Exact) -> cache.Cache:
    """All blocks in one call."""
    return encoding.encode(state, source, jobs(source.keys.shape[1]))


def by_definition(state: cache.Cache, source: Exact) -> cache.Cache:
    """The same through XLA."""
    keys = source.keys.astype(jnp.float32)
    if state.key_mean is not None:
        keys = keys - state.key_mean[0][:, None]
    shape = (source.keys.shape[1] // BLOCK, BLOCK, KV_HEADS, CHANNELS)
    layer = jnp.int32(0)
    packed = blocks.pack(
        state.codecs,
        state.codecs[0].quantize(layer, keys.reshape(shape)),
        state.codecs[1].quantize(layer, source.values.reshape(shape)),
    )
    return dataclasses.replace(state, pool=jax.tree.map(lambda x: x[None], packed))


def apart(state: cache.Cache, other: cache.Cache) -> float:
    """Part of the codes that differ."""
    found = [blocks.unpack(each.codecs, each.pool) for each in (state, other)]
    pairs = [(a[0], b[0]) for x, y in zip(*found, strict=True) for a, b in zip(x, y, strict=True)]
    return float(sum(jnp.mean(a != b) for a, b in pairs) / len(pairs))


def seconds(encode, state: cache.Cache, source: Exact) -> float:
    """Median time of a call in loops of CALLS; the pool is donated from loop to loop."""

    def loop(state: cache.Cache, source: Exact) -> cache.Cache:
        return lax.fori_loop(0, CALLS, lambda _, state: encode(state, source), state)

    run = jax.jit(loop, donate_argnums=0)
    times = []
    for _ in range(8):
        begin = time.perf_counter()
        state = jax.block_until_ready(run(state, source))
        times.append((time.perf_counter() - begin) / CALLS)
    return statistics.median(times[1:])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first so many")
    arguments = parser.parse_args()
    rows, copy, start = [], copy_bandwidth(), time.monotonic()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, copy {copy / 1e9:.0f} GB/s")
    for tokens in TOKENS:
        source = jax.jit(vectors, static_argnums=0)(tokens)
        for case in CASES[: arguments.cases]:
            bits, rotation, scale, centred = case
            make = jax.jit(empty, static_argnums=(0, 1, 2, 3, 4))
            state = make(*case, tokens)
            if centred:
                mean = jnp.mean(source.keys[:, :BLOCK].astype(jnp.float32), axis=1)[None]
                state = dataclasses.replace(state, key_mean=mean)
            nbytes = 4 * source.keys.size + blocks_bytes(state)
            different = float("nan")
            if tokens == TOKENS[0]:
                with jax.default_matmul_precision("highest"):
                    want = jax.jit(by_definition)(state, source)
                different = apart(jax.jit(by_kernel)(state, source), want)
            for name, encode in (("pallas", by_kernel), ("xla", by_definition)):
                if name == "xla" and case != CASES[0]:
                    continue
                took = seconds(encode, make(*case, tokens), source)
                rate = nbytes / took
                rows.append(
                    Row(
                        name, bits, rotation, scale, centred, tokens, took * 1e3, rate / 1e9,
                        rate / copy, different,
                    )
                )  # fmt: skip
                write_table(arguments.out, rows, time.monotonic() - start)
                print(
                    f"{name:6s} {bits} bits {rotation:8s} {scale:13s} centred {centred!s:5} "
                    f"{tokens:6d} tokens {took * 1e6:8.1f} us {rate / 1e9:6.0f} GB/s "
                    f"{rate / copy:5.2f} of copy, apart {different:.1e}",
                    flush=True,
                )


def blocks_bytes(state: cache.Cache) -> int:
    """Bytes of the packed blocks."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.pool))


if __name__ == "__main__":
    main()
