"""Arrays whose last elements signed 32-bit offsets do not reach."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.primitives import triton
from tests.pallas_kernels.cases import lower

WIDE = (2**16 + 1, 2**15)  # of bytes: more than 2**31, less than 2**32


def call(shape, **options):
    """Copies 32 bytes of the last row into the first one, which the output overwrites."""

    def kernel(x, out):
        place = jnp.arange(32)
        triton.store(out.at[0, place], triton.load(x.at[shape[0] - 1, place]))

    spec = triton.BlockSpec(shape, lambda i: (0, 0))
    return triton.call(
        kernel, triton.Launch((1,), warps=1, stages=1), in_specs=(spec,), out_specs=spec,
        out_shape=jax.ShapeDtypeStruct(shape, jnp.uint8), name="copy",
        **dict(aliases={0: 0}) | options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "rows"),
    [(WIDE, 2 * WIDE[0]), ((2**16, 2**15), 2**16), ((2**17 + 1, 2**15), 2**17 + 1)],
)
def test_the_backend_takes_them_for_longer_and_no_others(shape, rows):
    x = jax.ShapeDtypeStruct(shape, jnp.uint8)
    (equation,) = jax.make_jaxpr(call(shape))(x).eqns
    source, out = equation.params["grid_mapping"].block_mappings
    assert source.array_aval.shape == (rows, shape[1])
    assert out.array_aval.shape == shape
    assert "copy" in lower(call(shape), x).as_text()


def test_a_new_array_of_that_size_is_refused():
    with pytest.raises(
        NotImplementedError, match=r"copy: a new array .* of 2\*\*31 to 2\*\*32 bytes"
    ):
        jax.eval_shape(call(WIDE, aliases={}), jax.ShapeDtypeStruct(WIDE, jnp.uint8))


def test_a_jax_that_does_not_ask_is_refused(monkeypatch):
    monkeypatch.delattr(triton._Wide, "to_block_mapping")
    with pytest.raises(NotImplementedError, match="asks for no block mapping"):
        jax.eval_shape(call(WIDE), jax.ShapeDtypeStruct(WIDE, jnp.uint8))


def test_the_aliased_input_stands_in_for_the_output():
    x = jnp.arange(128, dtype=jnp.uint8).reshape(2, 64)
    with triton.interpreted():
        moved = call((2, 64))(x)
    assert moved[0, :32].tolist() == list(range(64, 96)) and moved[1, 0] == 64
    seen = []
    run = triton._through_inputs(lambda a, b, out: seen.append((a, b, out)), 2, {0: 1})
    run("a", "b", "out")
    assert seen == [("a", "b", "b")]


@pytest.mark.parametrize("loop", [False, True])
def test_what_is_traced_for_a_cpu_is_not_taken_for_a_gpu(loop):
    """Nor from the caches of what a jitted function calls."""
    seen = []

    def body(carry, x):
        seen.append(triton.is_interpreted())
        return carry + x, None

    inner = jax.jit(lambda x: jax.lax.scan(body, x, x[None])[0] if loop else body(x, x)[0])
    x = jnp.zeros(3)
    for _ in range(2):
        with triton.interpreted():
            jax.jit(lambda x: inner(x))(x)
        jax.jit(lambda x: inner(x))(x)
    assert seen == [True, False]
