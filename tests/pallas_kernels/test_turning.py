"""Queries in the rotated space, in one kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rotation import Rotation
from pallas_kernels.turning import rotate


@pytest.mark.parametrize(
    ("parts", "matrices", "channels", "heads", "signs"),
    [(1, 1, 64, 6, True), (3, 2, 80, 6, False), (1, 1, 16, 33, False)],
)
def test_equals_the_product(parts, matrices, channels, heads, signs):
    """Exact products, float32 sums; heads 0 to heads / matrices - 1 have the first matrix."""
    rng = np.random.default_rng(3)
    heads = heads * matrices
    shape = (parts, matrices, channels, channels)
    made = jnp.asarray(rng.normal(0, 1, shape), jnp.bfloat16)
    plus = jnp.asarray(rng.choice([-1.0, 1.0], channels), jnp.float32) if signs else None
    q = jnp.asarray(rng.normal(0, 1, (3, heads, channels)), jnp.bfloat16)
    got = jax.jit(lambda q, r: rotate(q, r, interpret=True))(q, Rotation(made, plus, gain=0.5))
    x = np.asarray(q, np.float64) * (np.asarray(plus) if signs else 1.0)
    matrix = np.repeat(np.asarray(made, np.float64).sum(axis=0), heads // matrices, axis=0)
    want = 0.5 * np.einsum("nij,bnj->bni", matrix, x)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_types_that_would_round_are_refused():
    rotation = Rotation(jnp.ones((1, 1, 16, 16), jnp.bfloat16))
    with pytest.raises(ValueError, match="queries of float32 and a rotation of bfloat16"):
        rotate(jnp.ones((1, 2, 16)), rotation, interpret=True)
