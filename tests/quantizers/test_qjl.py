"""The 1-bit sketch: unbiased at every number of rows, with the exact variance."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy import stats

from tests.compiling import FULL
from turboquant_jax.quantizers import bounds, qjl

KEY = jax.random.key(0)
DIM = 32


def rotated_pair(rho: float) -> tuple[np.ndarray, np.ndarray]:
    """Unit x and v with <v, x> = rho, dense."""
    x, u = np.linalg.qr(np.random.default_rng(2).normal(size=(DIM, 2)))[0].T
    return x.astype(np.float32), (rho * x + np.sqrt(1 - rho**2) * u).astype(np.float32)


@cache
def estimates(kind: str, rows: int, rho: float) -> np.ndarray:
    """10,000 estimates of <v, x> for one pair, each with a sketch of its own."""
    x, v = rotated_pair(rho)

    def draw(key):
        sketch = qjl.create(key, DIM, rows, kind=kind)
        return qjl.inner_product(sketch, qjl.project(sketch, v), *qjl.encode(sketch, x))

    keys = jax.random.split(jax.random.key(rows), 10_000)
    return np.asarray(jax.jit(partial(lax.map, draw, batch_size=2000), compiler_options=FULL)(keys))


@pytest.mark.parametrize(("kind", "rows"), [("gaussian", 8), ("gaussian", 80), ("orthogonal", 80)])
def test_the_estimate_is_unbiased_for_any_number_of_rows(kind, rows):
    got = estimates(kind, rows, 0.6)
    assert stats.sem(got) < 0.004
    assert abs(np.mean(got) - 0.6) < 4 * stats.sem(got)


@pytest.mark.parametrize("rows", [8, 80])
def test_variance_of_a_gaussian_sketch_is_exact(rows):
    """Var = (pi/2 - rho^2) / m. Over 10,000 estimates its s.e. is about 1.5 %."""
    got = estimates("gaussian", rows, 0.6)
    assert np.var(got) == pytest.approx((np.pi / 2 - 0.36) / rows, rel=0.06)


def test_variance_of_a_square_orthogonal_sketch_is_exact():
    """(pi / (2 kappa^2) - 1) / d, a mean over uniform v: here over an orthonormal basis of them."""

    def draw(key):
        sketch = qjl.create(key, DIM, kind="orthogonal")
        x = jnp.eye(DIM)[0]
        return jnp.mean(jnp.square(qjl.decode(sketch, *qjl.encode(sketch, x)) - x))

    got = jax.jit(jax.vmap(draw))(jax.random.split(KEY, 2000))
    kappa = bounds.qjl_constant(DIM)
    exact = (np.pi / (2 * kappa**2) - 1) / DIM
    assert abs(np.mean(got) - exact) < 4 * stats.sem(got)


def test_orthogonal_rows_are_haar_blocks_of_norm_sqrt_d():
    sketch = qjl.create(KEY, DIM, 80, kind="orthogonal")
    assert (sketch.rows, sketch.dim) == (80, DIM)
    gram = np.asarray(sketch.matrix) @ np.asarray(sketch.matrix).T / DIM
    np.testing.assert_allclose(gram[:32, :32], np.eye(32), atol=1e-5)
    np.testing.assert_allclose(gram[32:64, 32:64], np.eye(32), atol=1e-5)
    np.testing.assert_allclose(gram[64:, 64:], np.eye(16), atol=1e-5)
    assert np.max(np.abs(gram[:32, 32:64])) > 0.1  # the blocks are independent, not repeated
    assert np.max(np.abs(gram[:32, 32:64])) < 0.9


def test_inner_products_are_those_of_the_decoded_vectors():
    sketch = qjl.create(KEY, DIM, 40)
    rng = np.random.default_rng(0)
    x, v = rng.normal(size=(2, 5, DIM)), rng.normal(size=(3, DIM))
    plane, norm = jax.jit(qjl.encode)(sketch, x.astype(np.float32))
    assert plane.shape == (2, 5, 5) and plane.dtype == jnp.uint8
    np.testing.assert_allclose(norm, np.linalg.norm(x, axis=-1), rtol=1e-5)
    signs = np.where(x @ np.asarray(sketch.matrix).T >= 0, 1, -1)
    np.testing.assert_array_equal(qjl.signs(sketch, plane), signs)
    got = qjl.inner_product(sketch, qjl.project(sketch, v.astype(np.float32)), plane, norm)
    expected = np.einsum("qd,abd->qab", v, qjl.decode(sketch, plane, norm))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_zero_nan_and_sign_of_zero():
    sketch = qjl.create(KEY, DIM)
    x = np.zeros((3, DIM), np.float32)
    x[1, 4], x[2, 4] = np.nan, 1
    plane, norm = qjl.encode(sketch, x)
    np.testing.assert_array_equal(qjl.signs(sketch, plane)[:2], 1)  # sign(0) = +1
    assert norm[0] == 0 and np.isnan(norm[1]) and np.isclose(norm[2], 1)
    back = np.asarray(qjl.decode(sketch, plane, norm))
    assert np.all(back[0] == 0) and np.all(np.isnan(back[1])) and np.all(np.isfinite(back[2]))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="dim and rows: got 32 and 0, expected at least 2 and 1"):
        qjl.create(KEY, DIM, 0)
    with pytest.raises(ValueError, match="kind: got 'haar', expected one of gaussian, orthogonal"):
        qjl.create(KEY, DIM, kind="haar")
    with pytest.raises(ValueError, match=r"vectors: got shape \(3, 16\), expected dim 32"):
        qjl.project(qjl.create(KEY, DIM), jnp.zeros((3, 16)))
