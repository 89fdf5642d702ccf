"""A matrix times a vector, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.primitives import triton
from pallas_kernels.product import matrix_vector
from tests.marks import GPU


@pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=GPU)])
@pytest.mark.parametrize(
    ("rows", "channels", "dtype", "biased"),
    [(16, 2048, "bfloat16", False), (21, 72, "bfloat16", True), (8, 1500, "float16", True)],
)
def test_is_the_product(rows, channels, dtype, biased, interpret):
    """Whole tiles, and rows and channels that are none; one rounding, of the result."""
    rng = np.random.default_rng(5)
    weight, x, bias = (
        jnp.asarray(rng.normal(0, 1, shape), dtype) for shape in ((rows, channels), channels, rows)
    )
    with triton.interpreted(interpret):
        got = jax.jit(matrix_vector)(weight, x, bias if biased else None)
    wide, v, b = (np.asarray(y, np.float64) for y in (weight, x, bias))
    want, size = wide @ v + b * biased, np.abs(wide) @ np.abs(v)
    step = 2.0 ** (-8 if dtype == "bfloat16" else -11)
    assert got.dtype == dtype
    assert np.all(np.abs(np.asarray(got, np.float64) - want) <= step * np.abs(want) + 1e-6 * size)


def test_others_are_refused():
    x, weight = jnp.ones(4, jnp.bfloat16), jnp.ones((2, 4), jnp.bfloat16)
    with pytest.raises(ValueError, match="got bfloat16, float32, expected one 16-bit type"):
        matrix_vector(weight, x.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"vector and bias of \(2, 4\): got \(4,\) and \(4,\)"):
        matrix_vector(weight, x, x)
