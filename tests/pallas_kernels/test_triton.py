"""Arrays whose last elements signed 32-bit offsets do not reach."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import triton
from tests.pallas_kernels.cases import lower

WIDE = (2**16 + 1, 2**15)  # of bytes: more than 2**31, less than 2**32


def call(shape, **options):
    """Copies 32 bytes of the last row into the first one, which the output overwrites."""

    def kernel(x, out):
        place = jnp.arange(32)
        triton.store(out.at[0, place], triton.load(x.at[shape[0] - 1, place]))

    spec = triton.BlockSpec(shape, lambda i: (0, 0))
    return triton.call(
        kernel, grid=(1,), in_specs=(spec,), out_specs=spec,
        out_shape=jax.ShapeDtypeStruct(shape, jnp.uint8), warps=1, stages=1, name="copy",
        **dict(interpret=False, aliases={0: 0}) | options,
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
    assert "copy" in lower(call(shape), x)


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
    moved = call((2, 64), interpret=True)(x)
    assert moved[0, :32].tolist() == list(range(64, 96)) and moved[1, 0] == 64
    seen = []
    run = triton._through_inputs(lambda a, b, out: seen.append((a, b, out)), 2, {0: 1})
    run("a", "b", "out")
    assert seen == [("a", "b", "b")]
