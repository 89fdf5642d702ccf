"""What compression costs while a prompt is read, against cuDNN on bf16 alone.

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
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from experiments.harness.experiment import GPU, Row, Track, option
from experiments.speed import speed_claims
from experiments.speed.common import CHANNELS, HEADS, KV_HEADS, LAYERS, cache_config, vendor
from experiments.speed.device_time import device_time
from turboquant_jax import cache
from turboquant_jax.attention import attend_and_write

Kind = tuple[int, str]  # bits, mean
NEEDS = GPU


@dataclass(frozen=True)
class Config:
    """What to run."""

    repetitions: int = option(5, "of a prompt in chunks; twice as many of one in a chunk")
    cases: str = option("all", "all, or mean: with each mean", choices=("all", "mean"))
    bits: tuple[int, ...] = option((4, 3, 2), "bits of keys and values")
    whole: tuple[int, ...] = option((32768, 8192), "tokens of the prompts in one chunk")
    chunked: int = option(131072, "tokens of the prompt in chunks")
    chunk: int = option(8192, "tokens of a chunk")
    layers: int = option(LAYERS, "layers of the cache for the prompt in chunks")


SMOKE = Config(1, bits=(4,), whole=(128,), chunked=256, chunk=128, layers=1)


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


def plain(chunk: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Every chunk over itself, and over everything before it."""
    out = jnp.zeros((), jnp.float32)
    for start in range(0, q.shape[1], chunk):
        here = slice(start, start + chunk)
        own = vendor(q[:, here], k[:, here], v[:, here], True)
        out = out + own[0, -1, 0, 0].astype(jnp.float32)
        if start:
            past = vendor(q[:, here], k[:, :start], v[:, :start], False)
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
    config = cache_config(layers, bits, mean)
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
    yield _row(f"{setting}: cudnn", 16, tokens, *times, 1.0, float("nan"))
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
        yield _row(f"{setting}: compressed", bits, tokens, *times, ratio, peak / held, mean)


def _row(
    setting: str, bits: int, tokens: int, span: float, busy: float, ratio: float, peak: float,
    mean: str = "",
) -> Row:  # fmt: skip
    return {
        "setting": setting,
        "bits": bits,
        "tokens": tokens,
        "milliseconds": span,
        "busy_milliseconds": busy,
        "ratio_to_cudnn": ratio,
        "peak_ratio": peak,
        "mean": mean,
    }


def run(config: Config, track: Track) -> Iterator[Row]:
    """Prompts in one chunk, then the one in chunks."""
    whole = [("whole", tokens, tokens, 1, 2 * config.repetitions) for tokens in config.whole]
    long = ("chunked", config.chunked, config.chunk, config.layers, config.repetitions)
    cases, kinds = [*whole, long], [(bits, "") for bits in config.bits]
    if config.cases == "mean":
        cases, kinds = whole[:1], [(4, "stored"), (4, "pre_rope")]
    for case in track(cases, "prefill_speed"):
        yield from measure(kinds, *case)


claims = speed_claims.prefill
