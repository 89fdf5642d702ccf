"""What a step of decoding costs around the kernel, layer for layer.

All
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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.harness.experiment import GPU, Row, Track, option
from experiments.speed import speed_claims
from experiments.speed.common import CHANNELS, HEADS, KV_HEADS, LAYERS, cache_config, check
from experiments.speed.device_time import device_time
from pallas_kernels.decode_attention import PagedBlocks, Softmax, decode_attention
from turboquant_jax import attention, cache
from turboquant_jax.attention import kernel_call
from turboquant_jax.cache import Cache
from turboquant_jax.models.timing import filled_cache

SHAPES = ((8, 32768), (32, 4096))
NEEDS = GPU


@dataclass(frozen=True)
class Config:
    """What to run."""

    bits: tuple[int, ...] = option((4, 3, 2), "bits of keys and values")
    cases: str = option("all", "all, or mean: with each mean", choices=("all", "mean"))
    layers: int = option(LAYERS, "layers")
    steps: int = option(16, "steps of a loop")
    longest: int = option(32768, "shapes of more tokens are cut to this")


SMOKE = Config((4,), layers=1, steps=1, longest=256)


def filled(config: Config, bits: int, mean: str, batch: int, tokens: int) -> Cache:
    """A cache of about `tokens` random tokens a sequence."""
    sizes = batch, tokens, tokens + config.steps
    state = filled_cache(cache_config(config.layers, bits, mean), *sizes)
    return state.with_lengths(lengths_of(batch, tokens))


def lengths_of(batch: int, tokens: int) -> jax.Array:
    """Up to `tokens`, every sequence at another place within a block."""
    return tokens - 11 * jnp.arange(batch, dtype=jnp.int32) % 64


def over_layers(attend: Callable) -> Callable:
    """A step that calls `attend(state, layer, q, new) -> (state, q)` for every layer."""
    attend = jax.jit(attend)  # traced once

    def step(state: Cache, q: jax.Array, new: tuple) -> tuple[Cache, jax.Array]:
        for layer in range(state.config.num_layers):
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
                (kernel_call.blocks_of(state.parts[0]),), state.table.page_table, tokens,
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


def loop(step: Callable, sizes: tuple[int, int], state: Cache, q: jax.Array, new: tuple) -> tuple:
    """`sizes`: about so many tokens a sequence, and steps, all from the same lengths on."""
    lengths = lengths_of(q.shape[0], sizes[0])
    state = state.with_table(lengths=lengths, pending=jnp.zeros_like(lengths))
    return lax.fori_loop(0, sizes[1], lambda _, carry: step(*carry, new), (state, q))


def seconds(
    step: Callable, sizes: tuple[int, int], state: Cache, q: jax.Array, new: tuple
) -> tuple[float, Cache]:
    """Median time of one layer; the cache is donated from loop to loop."""
    run = jax.jit(partial(loop, step, sizes), donate_argnums=0)

    def once() -> jax.Array:
        nonlocal state
        state, out = run(state, q, new)
        return out

    return device_time(once).span / sizes[1] / state.config.num_layers, state


def run(config: Config, track: Track) -> Iterator[Row]:
    """Every part at every shape and number of bits."""
    means, shapes = [""], list(SHAPES)
    if config.cases == "mean":
        means, shapes = ["stored", "pre_rope"], list(SHAPES[:1])
    kinds = [(bits, mean) for bits in config.bits for mean in means]
    for bits, mean in kinds:
        check(cache_config(1, bits, mean))
    cases = [(shape, *kind) for shape in shapes for kind in kinds]
    for (batch, tokens), bits, mean in track(cases, "step_speed"):
        tokens = min(tokens, config.longest)
        q = jax.random.normal(jax.random.key(4), (batch, 1, HEADS, CHANNELS), jnp.bfloat16)
        size = (batch, 1, KV_HEADS, CHANNELS)
        new = tuple(jax.random.normal(jax.random.key(i), size, jnp.bfloat16) for i in (5, 6))
        state, base = filled(config, bits, mean, batch, tokens), None
        for name, part in PARTS.items():
            took, state = seconds(part, (tokens, config.steps), state, q, new)
            base = took if base is None else base
            yield {
                "part": name,
                "bits": bits,
                "batch": batch,
                "tokens": tokens,
                "milliseconds": took * 1e3,
                "ratio_to_blocks": took / base,
                "mean": mean,
            }


claims = speed_claims.step
