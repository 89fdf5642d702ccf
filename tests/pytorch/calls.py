"""Calls of the kernels as a cache of JAX makes them, in torch tensors, or as their shapes alone."""

import contextlib
import dataclasses
import functools
from dataclasses import replace
from unittest import mock

import jax
import ml_dtypes
import numpy as np
import torch

import pallas_kernels.encode
from pallas_kernels.primitives.triton import interpreted
from tests.layout import random_parts
from turboquant_jax import cache
from turboquant_jax.attention import PLAIN, kernel_call, triton
from turboquant_jax.cache import CacheConfig, CodecConfig, compression
from turboquant_jax.cache.choose import Compression
from turboquant_jax.cache.state import rows_of
from turboquant_jax.pytorch import operands, operators
from turboquant_jax.quantizers import trellis

# name: (bits, code, whether the mean is that before RoPE)
FORMATS = {
    "scalar 2": (2, "scalar", False),
    "scalar 3": (3, "scalar", False),
    "scalar 4": (4, "scalar", False),
    "scalar 8": (8, "scalar", False),
    "trellis 2": (2, "trellis", False),
    "trellis 3": (3, "trellis", False),
    "mean before RoPE 4": (4, "scalar", True),
}


def config_of(name: str, head_dim: int, **options) -> CacheConfig:
    """One layer of two kv heads."""
    bits, code, before_rope = FORMATS[name]
    codec = CodecConfig(bits, "hadamard", code=code)
    frequencies = tuple(0.1**i for i in range(head_dim // 2)) if before_rope else None
    return CacheConfig(
        1, 2, head_dim, codec, codec, window=64, rope_frequencies=frequencies, **options
    )


def recorded(config: CacheConfig, heads: int, capacity: int = 512) -> dict:
    """{operator: its arguments} of a step and a commit of three sequences, shapes alone."""
    state = jax.eval_shape(lambda: cache.create(config, 3, capacity, key=jax.random.key(0)))
    dtype = jax.numpy.dtype(config.dtype)
    query, new = (
        jax.ShapeDtypeStruct((3, 1, n, config.head_dim), dtype)
        for n in (heads, config.num_kv_heads)
    )

    def step(state, q, k, v):
        rows = rows_of(state, 0)
        triton.attend(state, rows, (q, k, v), PLAIN, None, write=True)
        triton.decode_pages(state, rows, state.table.page_table, jax.numpy.arange(2))
        return ()

    def blocks_of(state):
        compression.compress_single(state, Compression("pallas", "pallas"))
        return ()

    with recording() as found:
        jax.eval_shape(step, state, query, new, new)
        if config.key.code == "scalar":
            jax.eval_shape(blocks_of, state)
            add_rotated_mean(found["encode"][0][3])
        else:  # a kernel for the search alone
            rows = torch.empty((config.head_dim, 100), device="meta")
            found["trellis_encode"] = search_of(config, rows)
    return found


def add_rotated_mean(pool) -> None:
    """What JAX computes beside the kernel, of means of stored keys."""
    if pool.key_mean is not None and pool.pre_rope is None:
        pool.fields["rotated_mean"] = operators.rotated_means(pool.key_mean, pool.keys)


def search_of(config: CacheConfig, rows: torch.Tensor) -> tuple:
    """Arguments of the search for a trellis code."""
    return (rows, tuple(trellis.grid_levels(config.key.bits).tolist())), {}


def real(name: str, head_dim: int, heads: int, seed: int = 0) -> dict:
    """`recorded` with the numbers of a random cache of three sequences and of new tokens."""
    config = config_of(name, head_dim, block=32, sinks=2)
    rng = np.random.default_rng(seed)
    state = cache.create(config, 3, 320, key=jax.random.key(0))
    slots = state.table.page_table.shape[1]
    table = rng.permutation(3 * slots).astype(np.int32).reshape(3, slots)
    completing = config.sinks + config.window + config.block - 1
    state = replace(state, **random_parts(state, rng)).with_table(
        page_table=jax.numpy.asarray(table),
        lengths=jax.numpy.asarray([completing, 1, 3 * config.block + completing], jax.numpy.int32),
        pending=jax.numpy.asarray([1, 1, 1], jax.numpy.int32),
        pending_pages=jax.numpy.asarray(table),
    )
    q, k, v = (
        jax.numpy.asarray(rng.normal(0, 1, (3, 1, n, head_dim)), config.dtype)
        for n in (heads, config.num_kv_heads, config.num_kv_heads)
    )
    rows = rows_of(state, 0)
    with recording(run=("rotate",)) as found, interpreted():
        with contextlib.suppress(Recorded):
            triton.attend(state, rows, (q, k, v), PLAIN, None, write=True)
        with contextlib.suppress(Recorded):
            triton.decode_pages(state, rows, state.table.page_table, jax.numpy.arange(2))
        if config.key.code == "scalar":
            with contextlib.suppress(Recorded):
                compression.compress_single(state, Compression("pallas", "pallas"))
    if "encode" in found:
        add_rotated_mean(found["encode"][0][3])
    else:
        columns = torch.from_numpy(rng.normal(0, 1, (head_dim, 100)).astype(np.float32))
        found["trellis_encode"] = search_of(config, columns)
    return found


class Recorded(Exception):
    """Raised in the place of a call."""


@contextlib.contextmanager
def recording(run=("rotate", "decode_attention", "decode", "encode")):
    """{operator: (arguments, named arguments)} of the kernels' calls within, as torch has them.

    Calls that are not to `run` end in `Recorded`.
    """
    found: dict = {}

    def record(name, original):
        def call(*arguments, **named):
            found[name] = torch_of(arguments), torch_of(named)
            if "dtype" in named:
                found[name][1]["dtype"] = dtype_of(named["dtype"])
            if name not in run:
                raise Recorded
            return original(*arguments, **named)

        return call

    places = {
        "decode_attention": (triton, "decode_attention"),
        "decode": (triton, "decode_in_kernel"),
        "rotate": (kernel_call, "rotate_in_kernel"),
        "encode": (pallas_kernels.encode, "encode"),
    }
    with contextlib.ExitStack() as stack:
        for name, (module, attribute) in places.items():
            wrapped = record(name, getattr(module, attribute))
            stack.enter_context(mock.patch.object(module, attribute, wrapped))
        yield found


def torch_of(x):
    """Operands of `pallas_kernels` as those of torch; of tracers the shapes alone."""
    if isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct):
        return torch.empty(x.shape, dtype=dtype_of(x.dtype), device="meta")
    if isinstance(x, jax.Array | np.ndarray):
        return tensor_of(x)
    if isinstance(x, functools.partial):
        (layout,) = x.args
        return operands.places_of(layout)
    if dataclasses.is_dataclass(x):
        fields = {field.name: getattr(x, field.name) for field in dataclasses.fields(x)}
        fields |= {name: None for name in ("row", "layer") if name in fields}  # of one layer
        return operands.Operand(type(x).__name__, **{k: torch_of(v) for k, v in fields.items()})
    if isinstance(x, tuple | list):
        return tuple(map(torch_of, x))
    if isinstance(x, dict):
        return {k: torch_of(v) for k, v in x.items()}
    return x


def mapped(function, x):
    """Arguments with the function of each tensor."""
    if isinstance(x, torch.Tensor):
        return function(x)
    if isinstance(x, operands.Operand):
        return operands.Operand(x.kind, **mapped(function, x.fields))
    if isinstance(x, tuple):
        return tuple(mapped(function, y) for y in x)
    return {k: mapped(function, v) for k, v in x.items()} if isinstance(x, dict) else x


def tensor_of(x):
    """A tensor of its own."""
    array = np.array(x)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def dtype_of(x):
    return getattr(torch, jax.numpy.dtype(x).name)


def flat(name: str, given) -> tuple:
    """(name, text, shapes read, shapes written), which name a plan."""
    from turboquant_jax.pytorch import runner

    arguments, named = given
    call = getattr(operators, name).describe(*arguments, **named)
    spec, read, written = operands.flatten(call.arguments, call.written)
    return name, spec, runner.shapes_of(read), runner.shapes_of(written)
