"""Queries in the rotated space, and what is turned on the way there, in one kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.primitives import triton
from pallas_kernels.rope import RotationOperand, rope_and_rotate, rotate
from tests.marks import GPU
from turboquant_jax.attention import Projection


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
    with triton.interpreted():
        got = jax.jit(rotate)(q, RotationOperand(made, plus, gain=0.5))
    x = np.asarray(q, np.float64) * (np.asarray(plus) if signs else 1.0)
    matrix = np.repeat(np.asarray(made, np.float64).sum(axis=0), heads // matrices, axis=0)
    want = 0.5 * np.einsum("nij,bnj->bni", matrix, x)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=GPU)])
@pytest.mark.parametrize(
    ("parts", "matrices", "kv_heads", "per_head", "channels", "signs"),
    [(1, 1, 2, 3, 64, True), (3, 2, 2, 3, 80, False), (1, 1, 1, 1, 32, False)],
)
def test_rope_on_the_way(parts, matrices, kv_heads, per_head, channels, signs, interpret):
    """As `Projection.heads` turns, but for a rounding here and there, then as `rotate`."""
    rng = np.random.default_rng(4)
    shape = (parts, matrices, channels, channels)
    made = jnp.asarray(rng.normal(0, 1, shape), jnp.bfloat16)
    plus = jnp.asarray(rng.choice([-1.0, 1.0], channels), jnp.float32) if signs else None
    rotation = RotationOperand(made, plus, gain=0.5)
    qkv = jnp.asarray(rng.normal(0, 1, (5, kv_heads, per_head + 2, channels)), jnp.bfloat16)
    angle = rng.uniform(-9, 9, (5, channels // 2))
    cos, sin = (jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))
    with triton.interpreted(interpret):
        q, k, v, rotated = jax.jit(rope_and_rotate)(qkv, cos, sin, rotation)
        expected = np.asarray(jax.jit(rotate)(q, rotation))
    projection = Projection(*(x[:, None] for x in (qkv, cos, sin)))
    want = [x[:, 0] for x in projection.heads()]
    for got, exact in zip((q, k), want, strict=False):
        got, exact = (np.asarray(x, np.float32) for x in (got, exact))
        np.testing.assert_allclose(got, exact, rtol=2**-7, atol=1e-6)
        assert np.mean(got != exact) < 0.01
    np.testing.assert_array_equal(v, want[2])
    np.testing.assert_allclose(rotated, expected, atol=1e-5 * np.abs(expected).max())


def test_types_that_would_round_are_refused():
    rotation = RotationOperand(jnp.ones((1, 1, 16, 16), jnp.bfloat16))
    with pytest.raises(ValueError, match="queries and rotation: got float32 and bfloat16"):
        rotate(jnp.ones((1, 2, 16)), rotation)
    with pytest.raises(ValueError, match="projections and rotation: got float32 and bfloat16"):
        angles = jnp.ones((1, 8))
        rope_and_rotate(jnp.ones((1, 1, 3, 16)), angles, angles, rotation)
