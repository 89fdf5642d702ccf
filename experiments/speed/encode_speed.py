"""How fast keys and values are compressed, against the copy bandwidth of the same run.

One layer's keys and values in bfloat16, 8 kv heads of 128 channels, become packed blocks of 64
tokens.
Bytes are those read and written. Times are those of the device by the profiler, medians over chains
of calls: the sum of all kernels of a call, the small ones included. The vectors are more than L2
holds. `codes_apart` is the part of all codes that differ from the definition's, by rounding at a
threshold. `mean`: of the keys, "stored" or "pre_rope"; where it is empty, "stored" if `centred`.
"""

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments.harness.experiment import GPU, Row, Track, option
from experiments.speed import speed_claims
from experiments.speed.common import CHANNELS, FREQUENCIES, KV_HEADS
from experiments.speed.device_time import copy_bandwidth, device_time
from turboquant_jax import cache
from turboquant_jax.cache import blocks, encoding, pre_rope
from turboquant_jax.cache.compression import with_pools
from turboquant_jax.cache.state import Exact

BLOCK = 64
Case = tuple[int, Any, Any, bool]  # bits, rotation, scale, whether centred
CASES: tuple[Case, ...] = (
    *((bits, "hadamard", "least_squares", True) for bits in (4, 3, 2, 1, 5, 8)),
    (4, "hadamard", "least_squares", False),
    (4, "haar", "least_squares", True),
    (4, "hadamard", "norm", True),
    (4, "hadamard", "unbiased", True),
)
NEEDS = GPU
# Of a chain. The definition's calls do not depend on each other, and XLA would make them one.
CALLS = {"pallas": 4, "xla": 1}
UNTIMED: dict[str, str | bool] = {
    "xla_gpu_autotune_level": "0"
}  # for what is not timed: it takes longer than all the rest


@dataclass(frozen=True)
class Config:
    """What to run."""

    cases: int = option(len(CASES), "only the first so many")
    means: bool = option(False, "only the two means, at 4 bits")
    tokens: tuple[int, ...] = option((32768, 131072), "lengths; of the later ones one case")


SMOKE = Config(1, tokens=(128,))


def empty(case: Case, tokens: int, mean: str) -> cache.Cache:
    """A cache of one layer and one sequence."""
    bits, rotation, scale, centred = case
    codec = cache.CodecConfig(bits, rotation, scale=scale)
    config = cache.CacheConfig(
        1,
        KV_HEADS,
        CHANNELS,
        codec,
        codec,
        block=BLOCK,
        window=0,
        sinks=0,
        center_keys=centred,
        rope_frequencies=FREQUENCIES if mean == "pre_rope" else None,
    )
    return cache.create(config, 1, tokens, key=jax.random.key(0))


def vectors(tokens: int) -> Exact:
    """Normal keys with an offset, and normal values."""
    shape = (1, tokens, KV_HEADS, CHANNELS)
    keys, values = jax.random.normal(jax.random.key(1), (2, *shape))
    offset = 2 * jax.random.normal(jax.random.key(2), (1, 1, KV_HEADS, CHANNELS))
    return Exact((keys + offset).astype(jnp.bfloat16), values.astype(jnp.bfloat16))


def jobs(tokens: int) -> jax.Array:
    """Every block, none of which is a sequence's first and opens the mean."""
    block = jnp.arange(tokens // BLOCK, dtype=jnp.int32)
    zero = jnp.zeros_like(block)
    return jnp.stack([zero, BLOCK * block, block, zero, 1 + block], axis=1)


def by_kernel(state: cache.Cache, source: Exact) -> cache.Cache:
    """All blocks in one call."""
    return encoding.encode_jobs(state, 0, source, jobs(source.keys.shape[1]))


def by_definition(state: cache.Cache, source: Exact) -> cache.Cache:
    """The same through XLA."""
    keys = source.keys.astype(jnp.float32)
    if state.key_mean is not None:
        index = BLOCK + jnp.arange(keys.shape[1])  # behind a sequence's first block, as `jobs`
        keys = pre_rope.center(source.keys[0], state.key_mean[0, 0], state.phases, index)[None]
    shape = (source.keys.shape[1] // BLOCK, BLOCK, KV_HEADS, CHANNELS)
    rows, (codecs,) = jnp.arange(KV_HEADS), [part.codecs for part in state.parts]
    packed = blocks.pack(
        codecs,
        codecs[0].quantize(rows, keys.reshape(shape), "xla"),
        codecs[1].quantize(rows, source.values.reshape(shape), "xla"),
    )
    return with_pools(state, (jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), packed),))


def apart(state: cache.Cache, other: cache.Cache) -> float:
    """Part of the codes that differ."""
    found = [blocks.unpack(each.parts[0].codecs, each.parts[0].pool) for each in (state, other)]
    pairs = [(a[0], b[0]) for x, y in zip(*found, strict=True) for a, b in zip(x, y, strict=True)]
    return float(sum(jnp.mean(a != b) for a, b in pairs) / len(pairs))


@dataclass(frozen=True)
class Programs:
    """What is run of a case, compiled. Chains take the state given away."""

    case: Case
    tokens: int
    mean: str
    create: Callable[[], cache.Cache]
    chains: dict[str, Any]
    definition: Callable[[cache.Cache, Exact], cache.Cache]


def prepare(case: Case, tokens: int, mean: str = "") -> Programs:
    """Compile what a case needs."""

    def chain(encode, calls: int, state: cache.Cache, source: Exact) -> cache.Cache:
        for _ in range(calls):
            state = encode(state, source)
        return state

    create = partial(empty, case, tokens, mean)
    shapes = jax.eval_shape(create), jax.eval_shape(partial(vectors, tokens))
    encoders = {"pallas": by_kernel} | (
        {"xla": by_definition} if case == CASES[0] and not mean else {}
    )
    chains = {
        name: jax.jit(partial(chain, encode, CALLS[name]), donate_argnums=0)
        .lower(*shapes)
        .compile()
        for name, encode in encoders.items()
    }
    with jax.default_matmul_precision("highest"):
        definition = jax.jit(by_definition).lower(*shapes).compile(UNTIMED)
    return Programs(case, tokens, mean, jax.jit(create).lower().compile(), chains, definition)


def seconds(
    chain: Callable[[cache.Cache, Exact], cache.Cache], state: cache.Cache, source: Exact
) -> tuple[float, cache.Cache]:
    """Time of a chain, and what it made."""

    def once() -> cache.Cache:
        nonlocal state
        state = chain(state, source)
        return state

    return device_time(once).busy, state


def measure(programs: Programs, source: Exact, copy: float) -> Iterator[Row]:
    """Rows of one case."""

    def create() -> cache.Cache:
        state = programs.create()
        if state.key_mean is None:
            return state
        mean = jnp.mean(source.keys[:, :BLOCK].astype(jnp.float32), axis=1)[None]
        return dataclasses.replace(state, key_mean=mean)

    bits, rotation, scale, centred = programs.case
    want = programs.definition(create(), source)
    for name, chain in programs.chains.items():
        took, made = seconds(chain, create(), source)
        took /= CALLS[name]
        rate = (4 * source.keys.size + blocks_bytes(made)) / took
        yield {
            "implementation": name,
            "bits": bits,
            "rotation": rotation,
            "scale": scale,
            "centred": centred,
            "tokens": programs.tokens,
            "milliseconds": took * 1e3,
            "gigabytes_per_second": rate / 1e9,
            "fraction_of_copy_bandwidth": rate / copy,
            "codes_apart": apart(made, want),
            "mean": programs.mean,
        }


def run(config: Config, track: Track) -> Iterator[Row]:
    """Every case; all are compiled ahead, which takes longer than measuring."""
    first, *longer = config.tokens
    jobs = [(case, first, "") for case in CASES[: config.cases]]
    jobs += [(case, n, "") for n in longer for case in CASES[: min(config.cases, 1)]]
    if config.means:
        jobs = [(CASES[0], n, mean) for n in config.tokens for mean in ("stored", "pre_rope")]
    with ThreadPoolExecutor() as pool:
        prepared = list(pool.map(lambda job: prepare(*job), jobs))
    copy, source = copy_bandwidth(), None
    for programs in track(prepared, "encode_speed"):
        if source is None or source.keys.shape[1] != programs.tokens:
            source = jax.jit(vectors, static_argnums=0)(programs.tokens)
        yield from measure(programs, source, copy)


def blocks_bytes(state: cache.Cache) -> int:
    """Bytes of the packed blocks."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.parts[0].pool))


claims = speed_claims.encode
