"""How fast decoding and prefill are, and how fast they could be.

A past is *filled*, not prefilled: random codes at full length cost no forward pass, and a step
takes the same time whatever they say. Steps are timed inside the loop of `decode`.
"""

import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from turboquant_jax import cache
from turboquant_jax.cache import Cache, CacheConfig, Calibration, sharding
from turboquant_jax.cache.bytes import bytes_per_compressed_token, exact_bytes_per_token
from turboquant_jax.cache.compression import with_pools
from turboquant_jax.cache.mesh import on_shards
from turboquant_jax.models import dense
from turboquant_jax.models.config import LlamaConfig
from turboquant_jax.models.dense import Dense
from turboquant_jax.models.generate import Past, compiled_prefill, decode
from turboquant_jax.models.model import Llama
from turboquant_jax.models.sharding import past_shardings, placed

_PATTERN = 61  # random pages, or tokens, that repeat: as many bits as the past would take too long
# scales of 1 for the key and for the value, by the type of a word; codes of 8 bits below a base
_ONES = {"uint32": 0x3F803F80, "uint16": 0xFEFE, "uint8": 0xFE}


def filled_cache(
    config: CacheConfig,
    batch: int,
    context: int,
    capacity: int,
    calibration: Calibration | None = None,
    mesh: Mesh | None = None,
) -> Cache:
    """A cache in which every sequence has `context` tokens of random codes, window and sinks.

    On a mesh no device ever has all of it.
    """
    options: dict[str, Any] = dict(key=jax.random.key(0), calibration=calibration)
    if mesh is not None:
        state = sharding.create(mesh, config, batch, capacity, **options)
        fill = on_shards(mesh, functools.partial(filled, context=context), ())
        return jax.jit(fill, donate_argnums=0)(state)
    make = jax.jit(cache.create, static_argnums=(0, 1, 2))
    return filled(make(config, batch, capacity, **options), context)


def filled(state: Cache, context: int) -> Cache:
    """A cache with random codes in every page, as if every sequence had `context` tokens."""
    layers = state.num_layers
    keys = map(jax.random.key, itertools.count(1))

    def codes(pool: Array) -> Array:
        # a share of the rows at a time in place: all at once, XLA wants room for a second pool
        pattern = jax.random.bits(next(keys), (_PATTERN, *pool.shape[2:]), pool.dtype)
        for layer in range(layers):
            pool = _repeat(pool, pattern, layer, layers)
        return pool

    def exact(segment: Array) -> Array:
        token = jax.random.normal(next(keys), segment.shape[3:], segment.dtype)
        return _spread(segment, token)

    def some(leaf: Array) -> Array:
        if leaf.dtype == jnp.uint8 and leaf.ndim == 4:
            return codes(leaf)
        if leaf.ndim == 4:  # vectors in full precision: a page of them, over and over
            return _spread(leaf, jax.random.normal(next(keys), leaf.shape[2:], leaf.dtype))
        return _spread(leaf, jnp.asarray(_ONES.get(leaf.dtype.name, 1), leaf.dtype))

    pools = tuple(jax.tree.map(some, part.pool) for part in state.parts)
    state = dataclasses.replace(
        state,
        sinks=jax.tree.map(exact, state.sinks),
        window=jax.tree.map(exact, state.window),
    )
    return with_pools(state, pools).with_lengths(jnp.full_like(state.lengths, context))


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _repeat(pool: Array, pattern: Array, share: Array | int, shares: int) -> Array:
    """The pool with a share of its rows filled with pages that repeat, each in another order."""
    count = -(-pool.shape[0] // shares)
    row = jnp.minimum(share * count + jnp.arange(count), pool.shape[0] - 1)
    page = (jnp.arange(pool.shape[1])[None, :] + 7 * row[:, None]) % _PATTERN
    return pool.at[row].set(pattern[page])


@functools.partial(jax.jit, donate_argnums=0)
def _spread(array: Array, value: Array) -> Array:
    """The same in every place of an array, which is used, or else its memory could not be."""
    return array.at[...].set(value.reshape((1,) * (array.ndim - value.ndim) + value.shape))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def filled_dense(config: LlamaConfig, batch: int, context: int, capacity: int) -> Dense:
    """A dense past in bfloat16 in which every sequence has `context` random tokens."""
    state = dense.create(config, batch, capacity)
    size = (_PATTERN, config.num_kv_heads, config.head_dim)
    tokens = jax.random.normal(jax.random.key(1), size, state.keys[0].dtype)

    def layer(index: int, array: Array) -> Array:
        slot = (jnp.arange(capacity) + 7 * index) % _PATTERN
        return jnp.broadcast_to(tokens[slot][None], array.shape)

    return dataclasses.replace(
        state,
        keys=tuple(layer(2 * i, x) for i, x in enumerate(state.keys)),
        values=tuple(layer(2 * i + 1, x) for i, x in enumerate(state.values)),
        lengths=jnp.full(batch, context, jnp.int32),
    )


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of a step of each repetition, and bytes of the compiler's temporaries."""

    seconds: tuple[float, ...]
    temporary_bytes: int
    compile_seconds: float

    @property
    def median(self) -> float:
        """The median of the repetitions."""
        return statistics.median(self.seconds)


@dataclasses.dataclass(frozen=True)
class CompiledDecode:
    """`decode` for a past of certain shapes, and the seconds that compiling it took."""

    run: Any
    seconds: float


def compile_decode(
    model: Llama,
    make: Callable[[], Any],
    past: Past,
    steps: int,
    mesh: Mesh | None = None,
    options: Mapping[str, Any] | None = None,
) -> CompiledDecode:
    """Compile what a `DecodeLoop` with these arguments runs, `options` being those of XLA.

    Nothing is allocated; of the model too the shapes, with their places on a mesh, are enough.
    """
    past_shapes = jax.eval_shape(make)
    batch = past_shapes.lengths.shape[0]
    logits, keys = jax.eval_shape(functools.partial(_seeds, batch, model.config.vocab_size))
    if mesh is not None:
        past_shapes = placed(past_shapes, past_shardings(past_shapes, mesh))
        everywhere = NamedSharding(mesh, PartitionSpec())
        logits, keys = placed((logits, keys), (everywhere, everywhere))
    begin = time.perf_counter()
    lowered = decode.lower(
        model, logits, past_shapes.lengths, keys, past_shapes, past, max_tokens=steps + 1
    )
    compiled = lowered.compile(compiler_options=dict(options or {}))
    return CompiledDecode(compiled, time.perf_counter() - begin)


def _seeds(batch: int, vocab: int) -> tuple[Array, Array]:
    """Logits to begin with, and the keys of the sequences."""
    logits = jax.random.normal(jax.random.key(2), (batch, vocab), jnp.float32)
    return logits, jax.random.split(jax.random.key(3), batch)


class DecodeLoop:
    """Steps of greedy decoding in one compiled loop, each time from the same lengths on.

    `make()` gives the past, with room for `steps` more tokens. It is called after compilation,
    which may want memory of its own on the device; `compiled` is what was compiled before.
    """

    def __init__(
        self,
        model: Llama,
        make: Callable[[], Any],
        past: Past,
        steps: int,
        compiled: CompiledDecode | None = None,
        mesh: Mesh | None = None,
    ):
        compiled = compiled or compile_decode(model, make, past, steps, mesh)
        self._run, self.steps, self._mesh = compiled.run, steps, mesh
        self.compile_seconds = compiled.seconds
        self.temporary_bytes = _temporaries(self._run)
        self._state = make()
        logits, keys = _seeds(self._state.lengths.shape[0], model.config.vocab_size)
        if mesh is not None:
            logits, keys = jax.device_put((logits, keys), NamedSharding(mesh, PartitionSpec()))
        self._arguments = model, logits, jax.device_get(self._state.lengths), keys

    def seconds(self) -> float:
        """Seconds of a step; those of a first call count the loading of kernels too.

        Raises:
          ValueError: a past without room for the steps.
        """
        model, logits, lengths, keys = self._arguments
        state = self._state.with_lengths(jnp.asarray(lengths))
        positions = jnp.asarray(lengths)  # not the same buffer: the state is donated
        if self._mesh is not None:  # arrays without elements are anywhere
            state = jax.device_put(state, past_shardings(state, self._mesh))
        jax.block_until_ready((state, positions))
        begin = time.perf_counter()
        made = jax.block_until_ready(self._run(model, logits, positions, keys, state))
        seconds = time.perf_counter() - begin
        self._state = made.state
        if bool(jnp.any(made.state.overflow)):
            raise ValueError(f"got a past without room for {self.steps} more tokens, expected it")
        return seconds / self.steps


def time_decode(
    model: Llama,
    make: Callable[[], Any],
    past: Past,
    *,
    steps: int = 64,
    repeats: int = 3,
    compiled: CompiledDecode | None = None,
    mesh: Mesh | None = None,
) -> Timing:
    """Time steps of greedy decoding; see `DecodeLoop` for arguments and errors."""
    loop = DecodeLoop(model, make, past, steps, compiled, mesh)
    loop.seconds()
    seconds = tuple(loop.seconds() for _ in range(repeats))
    return Timing(seconds, loop.temporary_bytes, loop.compile_seconds)


def time_prefill(
    model: Llama,
    make: Callable[[], Any],
    batch: int,
    context: int,
    past: Past,
    *,
    chunk: int,
    repeats: int = 3,
) -> Timing:
    """Time passing `batch` prompts of `context` tokens; seconds are those of the whole.

    `make()` gives an empty past with room for them.
    """
    shape, vocab = (batch, context), model.config.vocab_size
    tokens = jax.random.randint(jax.random.key(4), shape, 0, vocab, jnp.int32)
    arguments = (model, tokens, jnp.full(batch, context, jnp.int32))
    begin = time.perf_counter()
    run = compiled_prefill.lower(*arguments, make(), past, chunk=chunk, empty=True).compile()
    compiled, seconds = time.perf_counter() - begin, []
    for repeat in range(repeats + 1):
        state = jax.block_until_ready(make())
        begin = time.perf_counter()
        jax.block_until_ready(run(*arguments, state))
        if repeat:
            seconds.append(time.perf_counter() - begin)
    return Timing(tuple(seconds), _temporaries(run), compiled)


def _temporaries(compiled: Any) -> int:
    analysis = compiled.memory_analysis()
    return 0 if analysis is None else analysis.temp_size_in_bytes


def copy_bandwidth(nbytes: int = 2**30) -> float:
    """Bytes read and written per second by x + 1 on the default device."""
    x = jnp.zeros((nbytes // 4,), jnp.int32)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x, times = jax.block_until_ready(add(x)), []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(10):
            x = add(x)
        jax.block_until_ready(x)
        times.append((time.perf_counter() - begin) / 10)
    return 2 * x.nbytes / statistics.median(times)


def weight_bytes(model: Llama) -> int:
    """Bytes of the weights that each device reads in a step: of an untied embedding few rows."""
    read = model if model.head is None else (model.layers, model.norm, model.head)
    shapes = ((leaf.sharding.shard_shape(leaf.shape), leaf) for leaf in jax.tree.leaves(read))
    return sum(math.prod(shape) * leaf.dtype.itemsize for shape, leaf in shapes)


def past_bytes(config: CacheConfig, context: float, compressed: bool) -> float:
    """Bytes of the past that a step of one sequence reads, as stored."""
    exact = exact_bytes_per_token(config)
    if not compressed:
        return context * exact
    inside = config.compressed_tokens(int(context))
    return inside * bytes_per_compressed_token(config) + (context - inside) * exact
