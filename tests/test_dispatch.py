"""What "xla" was asked for contains no kernel, however deep, on a device that would have one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend import core

from turboquant_jax import cache
from turboquant_jax.attention import (
    Projection,
    attend,
    attend_and_write,
    attend_projection,
    cudnn,
)
from turboquant_jax.attention.teacher_forcing import teacher_forced
from turboquant_jax.cache.state import rows_of
from turboquant_jax.models.config import LlamaConfig
from turboquant_jax.models.model import Llama
from turboquant_jax.models.past import COMPRESSED
from turboquant_jax.quantizers import quantizer

CODEC = cache.CodecConfig
SCALAR, TRELLIS, GROUPS = CODEC(4), CODEC(2, code="trellis"), CODEC(((16, 4), (16, 3)))
ORDER = np.random.default_rng(0).permuted(np.tile(np.arange(32), (2, 2, 1)), axis=-1)
LAYERS, BATCH, HEADS, DIM = 2, 2, 2, 32
CACHES = {
    "scalar": dict(key=SCALAR, value=SCALAR),
    "trellis": dict(key=TRELLIS, value=TRELLIS),
    "ordered groups": dict(key=GROUPS, value=GROUPS),
    "bits by layer": dict(allocation=cache.Allocation((4, 3), (2, 2))),
    "trellis, bits by head": dict(
        key=TRELLIS, value=TRELLIS, allocation=cache.Allocation(((2, 3), 2), (2, 2))
    ),
}


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def kernels_in(jaxpr):
    """Names of the primitives that call a kernel: ours, or the vendor's attention."""
    found = set()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "pallas_call" or "dot_product_attention" in name:
            found.add(name)
        for inner in jax.tree.leaves(equation.params, is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                found |= kernels_in(getattr(inner, "jaxpr", inner))
    return found


def is_jaxpr(x):
    return isinstance(x, core.Jaxpr | core.ClosedJaxpr)


def create(name):
    config = cache.CacheConfig(
        **dict(num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, block=32, window=5, sinks=2)
        | CACHES[name]
    )
    orders = dict(key_order=ORDER, value_order=ORDER) if "ordered" in name else {}
    return cache.create(config, BATCH, 100, key=jax.random.key(0), **orders)


def calls(name, count, **how):
    """Every public function that takes an implementation, by name: a jaxpr of it."""
    state, rng = jax.eval_shape(partial(create, name)), np.random.default_rng(0)
    q = rng.normal(size=(BATCH, count, 2 * HEADS, DIM)).astype(jnp.bfloat16)
    k = rng.normal(size=(BATCH, count, HEADS, DIM)).astype(jnp.bfloat16)
    qkv = rng.normal(size=(BATCH, count, HEADS, 4, DIM)).astype(jnp.bfloat16)
    angles = rng.normal(size=(BATCH, count, DIM // 2)).astype(np.float32)
    layers = np.stack([k] * LAYERS)
    projection = Projection(qkv, angles, angles)
    functions = {
        "write": lambda state: cache.write(state, 1, k, k, **how),
        "commit": lambda state: cache.commit(state, **how),
        "append": lambda state: cache.append(state, layers, layers, **how),
        "attend": lambda state: attend(state, 0, q, k, k, **how),
        "attend_and_write": lambda state: attend_and_write(state, 0, q, k, k, **how),
        "attend_projection": lambda state: attend_projection(
            state, rows_of(state, 0), projection, **how
        ),
        "teacher_forced": lambda state: teacher_forced(state, 0, q, k, k, **how),
    }
    return {label: kernels_in(jax.make_jaxpr(f)(state).jaxpr) for label, f in functions.items()}


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("name", CACHES)
def test_xla_is_xla_all_the_way_down(name, count):
    found = calls(name, count, implementation="xla")
    assert not any(found.values()), found


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("name", ["scalar", "trellis", "ordered groups"])  # whom each kernel serves
def test_what_was_not_asked_for_is_a_kernel_where_one_serves(name, count, monkeypatch):
    monkeypatch.setattr(cudnn, "VENDOR", "xla")  # cuDNN cannot be traced without a GPU
    searched = "trellis" in name
    compressed = searched or "ordered" not in name
    attended = "head" not in name  # what XLA attends to it also compresses
    served = {
        "write": compressed and count > 1,  # of one token nothing is compressed here
        "commit": compressed,
        "append": compressed,
        "attend": attended,
        "attend_and_write": attended,
        "attend_projection": attended,
        "teacher_forced": searched,
    }
    expected = {label: {"pallas_call"} if by else set() for label, by in served.items()}
    with jax.numpy_dtype_promotion("standard"):  # this vendor mixes dtypes
        assert calls(name, count) == expected


@pytest.mark.parametrize("name", CACHES)
def test_what_moves_no_tokens_has_no_kernel(name):
    state = jax.eval_shape(partial(create, name))
    counts, rows = np.ones(BATCH, np.int32), np.ones(BATCH, bool)
    for call in (
        lambda state: create(name),
        lambda state: cache.begin(state, counts, 40),
        lambda state: cache.fork(state, 0, 1),
        lambda state: cache.free(state, rows),
    ):
        assert kernels_in(jax.make_jaxpr(call)(state).jaxpr) == set()


@pytest.mark.parametrize("code", ["scalar", "trellis"])
def test_the_quantizer(code):
    made = quantizer.create(jax.random.key(0), DIM, 2, codebook="grid", code=code)
    x = jax.ShapeDtypeStruct((8, DIM), jnp.float32)

    def kernels(**how):
        encode = partial(quantizer.encode, made, **how)
        codes = jax.eval_shape(encode, x)
        return [
            kernels_in(jax.make_jaxpr(f)(argument).jaxpr)
            for f, argument in ((encode, x), (partial(quantizer.decode, made), codes))
        ]

    assert kernels(implementation="xla") == [set(), set()]
    assert kernels() == [{"pallas_call"} if code == "trellis" else set(), set()]


@pytest.mark.parametrize(
    ("architecture", "kernels"),
    [
        ({}, ["rope_and_rotate"]),
        (dict(qkv_bias=True), ["rope_and_rotate"]),
        (dict(qk_norm=True, sliding_window=50), ["rope_and_rotate"]),
        (dict(rotary_dim=DIM // 2), ["rotate_queries"]),  # the fused kernel turns whole heads
    ],
)
def test_which_kernel_turns_the_queries_of_an_architecture(architecture, kernels):
    sizes = (64, 32, 48, LAYERS, 2 * HEADS, HEADS, DIM, 200, 1e4, 1e-5, True)
    config = LlamaConfig(*sizes, **architecture)
    window = {"sliding_window": config.sliding_window, "window": 5, "block": 32}
    shape = cache.CacheConfig(LAYERS, HEADS, DIM, **window)
    state = jax.eval_shape(lambda: cache.create(shape, BATCH, 100, key=jax.random.key(0)))
    model = nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0)))
    token = jax.ShapeDtypeStruct((BATCH, 1), jnp.int32)
    jaxpr = str(jax.make_jaxpr(lambda *x: x[0](x[1], x[1], x[2], COMPRESSED.attend))(
        model, token, state
    ))  # fmt: skip
    found = [name for name in ("rope_and_rotate", "rotate_queries") if f"name={name}" in jaxpr]
    assert found == kernels
