"""How much faster several GPUs are than one: attention over heads and over a context, a decoder.

`attention` is that of a layer for one new token a sequence, 32 query and 8 kv heads of 128 channels
at 4 bits with the mean before RoPE (over a context without a mean), the layers of a cache one after
another in a loop on the device. `decoder` is a step of greedy decoding with the sizes of
Llama-3-8B, random weights in bfloat16. Times are of the host around the whole loop, medians. One
device runs what it runs without a mesh; `ratio_to_one` is its time by that of the mesh. Over
`tensor` a device has its kv heads, over `context` its stripes of the tokens, over `data` its
sequences.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from experiments.harness.experiment import AIM, GPU, Claim, Row, Track, option, where
from experiments.harness.journal import open_journal
from experiments.harness.statistics import met
from experiments.speed.common import CHANNELS, HEADS, KV_HEADS, cache_config
from turboquant_jax import attention, cache
from turboquant_jax.attention import sharding as attention_sharding
from turboquant_jax.cache import Cache, CacheConfig, CodecConfig, sharding
from turboquant_jax.cache.mesh import make_mesh, on_shards
from turboquant_jax.models import PRESETS, timing
from turboquant_jax.models import sharding as model_sharding
from turboquant_jax.models.generate import decode
from turboquant_jax.models.model import random_model
from turboquant_jax.models.past import COMPRESSED, on_mesh
from turboquant_jax.models.rope import centring

NEEDS = GPU
_AIM = 1.7
_NEAR = 1e-3


@dataclass(frozen=True)
class Config:
    """What to run."""

    cases: tuple[str, ...] = option(
        ("attention tensor 8x32768", "attention context 1x1048576", "decoder tensor 8x32768"),
        "what, axis, batch x tokens",
    )
    devices: tuple[int, ...] = option((1, 2), "devices of the axis, one first")
    layers: int = option(2, "layers of the cache, of attention")
    model: str = option("llama-3-8b", "preset whose sizes the decoder has")
    steps: int = option(32, "turns of a loop")
    repeats: int = option(5, "timed loops; their median counts")
    seconds: float = option(0.0, "start no case after so long, 0 for never")


SMOKE = Config(("attention tensor 2x200",), (1,), 1, "smollm2-135m", 2, 1)


def run(config: Config, track: Track) -> Iterator[Row]:
    """Every case with every number of devices, first whether a mesh is right."""
    journal, base = open_journal("sharded_speed", config, ("cases", "devices")), dict[str, float]()
    most = max(config.devices)
    for axis in sorted({case.split()[1] for case in config.cases}) if most > 1 else ():
        check(make_mesh(**{axis: most}))
    every = [(case, devices) for case in config.cases for devices in config.devices]
    for case, devices in track(every, "sharded_speed"):
        measure = partial(_measured, config, case, devices, base)
        for row in journal.measure(f"{case} on {devices}", measure):
            if devices == 1:
                base[case] = row["milliseconds"]
            yield row


def _measured(config: Config, case: str, devices: int, base: dict[str, float]) -> list[Row]:
    what, axis, size = case.split()
    batch, tokens = map(int, size.split("x"))
    mesh = None if devices == 1 else make_mesh(**{axis: devices})
    if what == "attention":
        seconds = attention_time(config, mesh, batch, tokens, centred=axis != "context")
    else:
        seconds = decoder_time(config, mesh, batch, tokens)
    milliseconds = 1e3 * seconds
    gc.collect()
    return [
        {
            "what": what,
            "axis": axis,
            "devices": devices,
            "batch": batch,
            "tokens": tokens,
            "milliseconds": milliseconds,
            "ratio_to_one": base.get(case, milliseconds if devices == 1 else float("nan"))
            / milliseconds,
        }
    ]


def filled(config: CacheConfig, mesh: Mesh | None, batch: int, tokens: int, room: int) -> Cache:
    """A cache of random codes, on one device or on a mesh, where no device ever has all of it."""
    if mesh is None:
        return timing.filled_cache(config, batch, tokens, tokens + room)
    state = sharding.create(mesh, config, batch, tokens + room, key=jax.random.key(0))
    fill = on_shards(mesh, partial(timing.filled, context=tokens), ())
    return jax.jit(fill, donate_argnums=0)(state)


def sizes(layers: int, centred: bool) -> CacheConfig:
    """The cache; over a context of several GPUs keys have no mean."""
    config = cache_config(layers, 4, "pre_rope" if centred else "")
    return config if centred else replace(config, center_keys=False)


def attention_time(
    config: Config, mesh: Mesh | None, batch: int, tokens: int, centred: bool = True
) -> float:
    """Seconds of one layer's attention."""
    state = filled(sizes(config.layers, centred), mesh, batch, tokens, 64)
    attend = attention.attend
    if mesh is not None:
        attend = partial(attention_sharding.attend, mesh)
    q, new = queries(batch)

    @jax.jit
    def loop(state: Cache, q: jax.Array, new: tuple) -> jax.Array:
        def step(_: Any, q: jax.Array) -> jax.Array:
            for layer in range(config.layers):
                q = attend(state, layer, q, *new)
            return q

        return lax.fori_loop(0, config.steps, step, q)

    seconds = median_time(lambda: loop(state, q, new), config.repeats)
    return seconds / config.steps / config.layers


def decoder_time(config: Config, mesh: Mesh | None, batch: int, tokens: int) -> float:
    """Seconds of a step of greedy decoding of the whole decoder."""
    llama = PRESETS[config.model]
    sizes = llama.num_layers, llama.num_kv_heads, llama.head_dim
    codecs = CodecConfig(4), CodecConfig(4, rotation="identity")
    options = CacheConfig(*sizes, *codecs, **centring(llama))
    model, past = random_model(llama, 0, stacked=False), COMPRESSED
    if mesh is not None:
        model, past = model_sharding.shard(model, mesh), on_mesh(mesh)
    state = filled(options, mesh, batch, tokens, config.steps + 1)
    positions = np.full(batch, tokens, np.int32)
    logits = jax.random.normal(jax.random.key(2), (batch, llama.vocab_size))
    keys = jax.random.split(jax.random.key(3), batch)

    def loop() -> jax.Array:
        nonlocal state
        state = state.with_lengths(jnp.full_like(state.lengths, tokens))
        made = decode(
            model, logits, jnp.asarray(positions), keys, state, past, max_tokens=config.steps + 1
        )
        state = made.state
        return made.tokens

    return median_time(loop, config.repeats) / config.steps


def median_time(run: Callable[[], jax.Array], repeats: int) -> float:
    """Seconds of a call; the first one, which compiles, does not count."""
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def queries(batch: int, dtype: Any = jnp.bfloat16) -> tuple[jax.Array, tuple]:
    """Of one token a sequence the query, and its key and value."""
    q = jax.random.normal(jax.random.key(4), (batch, 1, HEADS, CHANNELS), dtype)
    shape = batch, 1, KV_HEADS, CHANNELS
    return q, tuple(jax.random.normal(jax.random.key(i), shape, dtype) for i in (5, 6))


def check(mesh: Mesh) -> None:
    """A mesh that is wrong is not timed: a prompt and a few tokens, against one device.

    The second sequence completes its first block by a single token.

    Raises:
      ValueError: a relative error of the outputs that is not small.
    """
    print(f"check {dict(mesh.shape)}", flush=True)
    config, batch, capacity = sizes(1, mesh.shape["context"] == 1), 2, 9200
    counts = jnp.array([9000, config.sinks + config.window + config.block - 1], jnp.int32)
    shape = 2, 1, batch, capacity - 200, KV_HEADS, CHANNELS
    k, v = jax.random.normal(jax.random.key(7), shape, jnp.bfloat16)
    q, new = queries(batch, jnp.float32)
    found = []
    for own in (None, mesh):
        create, append, attend = cache.create, cache.append, attention.attend
        if own is not None:
            create, append = (partial(f, own) for f in (sharding.create, sharding.append))
            attend = partial(attention_sharding.attend, own)
        state = create(config, batch, capacity, key=jax.random.key(0))
        append = jax.jit(append)
        state = append(state, k, v, counts)
        for _ in range(2):
            state = append(state, *(x.astype(jnp.bfloat16)[None] for x in new))
        found.append(np.asarray(jax.jit(attend, static_argnums=1)(state, 0, q, *new)))
    error = float(np.linalg.norm(found[1] - found[0]) / np.linalg.norm(found[0]))
    print(f"checked {dict(mesh.shape)}: relative error {error:.1e}", flush=True)
    if not error < _NEAR:
        raise ValueError(f"{mesh}: got relative error {error}, expected below {_NEAR}")


def claims(rows: Sequence[Row]) -> list[Claim]:
    """A claim for every row of several devices."""
    found = []
    for row in rows:
        if row["devices"] == 1:
            continue
        what = f"{row['what']} over {row['axis']}, {row['batch']} x {row['tokens']}"
        one = where(rows, **{k: row[k] for k in ("what", "axis", "batch", "tokens")}, devices=1)
        found.append(
            Claim(
                AIM,
                f"{what}: {row['devices']} devices at least {_AIM} times as fast as one",
                f"{row['ratio_to_one']:.2f} times: {row['milliseconds']:.3f} ms, "
                f"{one[0]['milliseconds']:.3f} ms on one"
                if one
                else "no row of one device",
                met(row["ratio_to_one"] >= _AIM),
            )
        )
    return found
