"""What a step of decoding costs around the kernel, layer for layer.

`python -m experiments.speed.step_speed --out DIR` on a GPU writes DIR/rows.csv, prints a table. All
layers of a cache (32 layers of 32 query and 8 kv heads of 128 channels), one new token per
sequence; times are per layer:

    blocks      the fused kernel over the compressed blocks alone, queries already rotated
    attention   rotate, attend to all segments and the new token, merge, un-rotate
    layer       attention, and the token's key and value written
    step        all layers, with `begin` and `commit`: allocation and compression included

Each is a loop on the device in which an output is the next query and the layers stand one after
another, as in a decoder that is not scanned. A time is the span of the loop on
the device, gaps included, by the profiler, and the median over loops. Every layer has a cache of
its own, so that L2 holds none; the sequences are of different lengths, so that one in 64 completes
a block in a step. `mean`: of the keys, "stored" or "pre_rope"; "stored" where it is empty.
"""

import argparse
import dataclasses
import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.harness.results import write_table
from experiments.speed.device_time import device_time
from pallas_kernels.decode_attention import PagedBlocks, Softmax, decode_attention
from turboquant_jax import attention, cache
from turboquant_jax.attention import triton
from turboquant_jax.cache import Cache, CacheConfig, CodecConfig
from turboquant_jax.cache.blocks import Blocks
from turboquant_jax.cache.compression import with_pools

SHAPES = ((8, 32768), (32, 4096))
BITS = (4, 3, 2)
LAYERS, HEADS, KV_HEADS, CHANNELS = 32, 32, 8, 128
STEPS = 16
FREQUENCIES = tuple(5e5 ** -(i / (CHANNELS // 2)) for i in range(CHANNELS // 2))


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of rows.csv; milliseconds per layer."""

    part: str
    bits: int
    batch: int
    tokens: int
    milliseconds: float
    ratio_to_blocks: float
    mean: str = ""


def filled(bits: int, batch: int, tokens: int, layers: int = LAYERS, mean: str = "") -> Cache:
    """A cache of about `tokens` random tokens a sequence: random codes, plausible scales."""
    codec = CodecConfig(bits)
    turned = FREQUENCIES if mean == "pre_rope" else None
    config = CacheConfig(layers, KV_HEADS, CHANNELS, codec, codec, rope_frequencies=turned)
    keys = map(jax.random.key, itertools.count(1))

    @jax.jit
    def make() -> Cache:
        state = cache.create(config, batch, tokens + STEPS, key=jax.random.key(0))
        (part,) = state.parts
        codes = jax.tree.map(
            lambda x: jax.random.bits(next(keys), x.shape, x.dtype),
            (part.pool.keys, part.pool.values),
        )
        scales = jax.tree.map(lambda x: jnp.full_like(x, 0x3F803F80), part.pool.scales)  # 1.0
        window = jax.tree.map(
            lambda x: jax.random.normal(next(keys), x.shape, x.dtype), (state.sinks, state.window)
        )
        state = dataclasses.replace(state, sinks=window[0], window=window[1])
        state = with_pools(state, (Blocks(codes[0], codes[1], scales),))
        return state.with_lengths(lengths_of(batch, tokens))

    return make()


def lengths_of(batch: int, tokens: int) -> jax.Array:
    """Up to `tokens`, every sequence at another place within a block."""
    return tokens - 11 * jnp.arange(batch, dtype=jnp.int32) % 64


def check(bits: int, mean: str) -> float:
    """Relative error of attention by the kernel against the definition, on the device."""
    state = filled(bits, 3, 1000, 2, mean)
    q = jax.random.normal(jax.random.key(2), (3, 1, HEADS, CHANNELS))
    k, v = jax.random.normal(jax.random.key(3), (2, 3, 1, KV_HEADS, CHANNELS))
    run = jax.jit(attention.attend, static_argnames="implementation")
    with jax.default_matmul_precision("highest"):
        want = run(state, 1, q, k, v, implementation="xla")
    got = run(state, 1, q, k, v, implementation="pallas")
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


def over_layers(attend: Callable) -> Callable:
    """A step that calls `attend(state, layer, q, new) -> (state, q)` for every layer."""
    attend = jax.jit(attend)  # traced once

    def step(state: Cache, q: jax.Array, new: tuple) -> tuple[Cache, jax.Array]:
        for layer in range(LAYERS):
            state, q = attend(state, np.int32(layer), q, new)
        return state, q

    return step


def blocks_step(state: Cache, q: jax.Array, new: tuple) -> tuple[Cache, jax.Array]:
    """The kernel alone."""
    tokens = state.config.compressed_tokens(state.lengths)

    def blocks(state: Cache, layer: jax.Array, q: jax.Array, new: tuple) -> tuple:
        del new
        out, *_ = decode_attention(
            q[:, 0],
            PagedBlocks(
                triton.groups_of(state.parts[0]), state.table.page_table, tokens,
                layer * KV_HEADS, KV_HEADS,
            ),
            Softmax(CHANNELS**-0.5),
            dtype=q.dtype,
        )  # fmt: skip
        return state, out[:, None]

    return over_layers(blocks)(state, q, new)


def attend(state: Cache, layer: jax.Array, q: jax.Array, new: tuple) -> tuple:
    """A layer's attention."""
    return state, attention.attend(state, layer, q, *new, implementation="pallas")


def attend_and_write(state: Cache, layer: jax.Array, q: jax.Array, new: tuple) -> tuple:
    """A layer's attention, then its append."""
    out, state = attention.attend_and_write(state, layer, q, *new, implementation="pallas")
    return state, out


def model_step(state: Cache, q: jax.Array, new: tuple) -> tuple[Cache, jax.Array]:
    """What a model does for one token of each sequence, but for its weights."""
    state = cache.begin(state, jnp.ones_like(state.lengths), 1)
    state, q = over_layers(attend_and_write)(state, q, new)
    return cache.commit(state), q


def layer_step(state: Cache, q: jax.Array, new: tuple) -> tuple[Cache, jax.Array]:
    """All layers of one token; the tokens are pending, and never counted."""
    state = state.with_table(pending=jnp.ones_like(state.lengths))
    return over_layers(attend_and_write)(state, q, new)


PARTS = {
    "blocks": blocks_step,
    "attention": over_layers(attend),
    "layer": layer_step,
    "step": model_step,
}


def loop(step: Callable, tokens: int, state: Cache, q: jax.Array, new: tuple) -> tuple:
    """STEPS steps from the same lengths on."""
    lengths = lengths_of(q.shape[0], tokens)
    state = state.with_table(lengths=lengths, pending=jnp.zeros_like(lengths))
    return lax.fori_loop(0, STEPS, lambda _, carry: step(*carry, new), (state, q))


def seconds(
    step: Callable, state: Cache, q: jax.Array, new: tuple, tokens: int
) -> tuple[float, Cache]:
    """Median time of one layer; the cache is donated from loop to loop."""
    run = jax.jit(partial(loop, step, tokens), donate_argnums=0)

    def once() -> jax.Array:
        nonlocal state
        state, out = run(state, q, new)
        return out

    return device_time(once).span / STEPS / LAYERS, state


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="*", default=BITS)
    parser.add_argument("--cases", choices=("all", "mean"), default="all")
    arguments = parser.parse_args()
    means, shapes = [""], list(SHAPES)
    if arguments.cases == "mean":
        means, shapes = ["stored", "pre_rope"], list(SHAPES[:1])
    kinds = [(bits, mean) for bits in arguments.bits for mean in means]
    rows, start = [], time.monotonic()
    for bits, mean in kinds:
        error = check(bits, mean)
        print(f"check {bits} bits: relative error {error:.1e}", flush=True)
        if not error < 5e-3:
            raise ValueError(f"got relative error {error} at {bits} bits, expected below 5e-3")
    for batch, tokens in shapes:
        q = jax.random.normal(jax.random.key(4), (batch, 1, HEADS, CHANNELS), jnp.bfloat16)
        size = (batch, 1, KV_HEADS, CHANNELS)
        new = tuple(jax.random.normal(jax.random.key(i), size, jnp.bfloat16) for i in (5, 6))
        for bits, mean in kinds:
            state, base = filled(bits, batch, tokens, mean=mean), None
            for name, part in PARTS.items():
                took, state = seconds(part, state, q, new, tokens)
                base = took if base is None else base
                rows.append(Row(name, bits, batch, tokens, took * 1e3, took / base, mean))
                write_table(arguments.out, rows, time.monotonic() - start)
                print(
                    f"{name:9s} {bits} bits {mean:8s} "
                    f"{batch:3d} x {tokens:<6d} {took * 1e6:8.1f} us"
                    f" {took / base:5.2f}x the kernel",
                    flush=True,
                )


if __name__ == "__main__":
    main()
