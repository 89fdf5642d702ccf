"""The Viterbi kernel makes the indices of the definition, bit for bit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.primitives import triton
from pallas_kernels.trellis import encode
from tests.marks import GPU
from turboquant_jax.quantizers import trellis


@pytest.mark.parametrize(
    ("bits", "vectors", "dim", "interpret"),
    [
        (1, 45, 20, True),
        (2, 33, 7, True),
        (3, 64, 16, True),
        (4, 3, 6, True),
        *(pytest.param(b, 1000, d, False, marks=GPU) for b in (1, 2, 3, 4) for d in (64, 80, 128)),
    ],
)
def test_the_kernel_equals_the_definition(bits, vectors, dim, interpret):
    """Vectors that fill no whole program, dims that are no multiple of a turn; zeros are ties."""
    y = np.random.default_rng(bits).standard_normal((vectors, dim)).astype(np.float32)
    y[1] = 0.0
    y[2, ::2] *= 1e3
    levels = tuple(float(level) for level in trellis.grid_levels(bits))
    rows = jnp.asarray(y.T)
    with triton.interpreted(interpret):
        got = jax.jit(partial(encode, levels=levels))(rows)
    want = trellis.encode_with(jnp.asarray(y), jnp.asarray(levels, jnp.float32))
    np.testing.assert_array_equal(got.T, want)


def test_levels_are_a_power_of_two():
    with pytest.raises(ValueError, match="levels: got 6,"):
        encode(jnp.zeros((8, 32)), (0.0,) * 6)
