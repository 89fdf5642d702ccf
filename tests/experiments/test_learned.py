"""Learned rotations stay orthogonal and lower the error, on other vectors too."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.quantizers import learned
from turboquant_jax.quantizers import quantizer

DIM = 16


def vectors(seed: int) -> np.ndarray:
    """Independent Gaussian channels whose deviations fall from 1 to .05."""
    deviation = np.exp(np.linspace(0, -3, DIM))
    x = np.random.default_rng(seed).normal(size=(2000, DIM)) * deviation[None]
    return x.astype(np.float32)


def error(q: quantizer.Quantizer, x: np.ndarray) -> float:
    back = jax.jit(lambda q, x: quantizer.decode(q, quantizer.encode(q, x)))(q, x)
    return float(np.mean(np.sum((x - back) ** 2, axis=-1) / np.sum(x**2, axis=-1)))


@pytest.mark.parametrize(("start", "gain"), [("identity", 0.5), ("haar", 0.9), ("hadamard", 1.01)])
def test_learning_lowers_the_error_on_other_vectors_too(start, gain):
    """A Hadamard start is at a good place already for independent channels."""
    q = quantizer.create(jax.random.key(0), DIM, 2, rotation=start, scale="norm")
    rotation, errors = learned.learn(q, vectors(1), steps=60)
    assert errors.shape == (60,)
    gram = np.asarray(rotation.matrix, np.float64) @ np.asarray(rotation.matrix, np.float64).T
    np.testing.assert_allclose(gram, np.eye(DIM), atol=1e-5)
    better = replace(q, rotation=rotation)
    assert error(better, vectors(2)) < gain * error(q, vectors(2))
    # what it reports is what the quantizers do, up to the rounding of the stored scale
    assert float(errors[0]) == pytest.approx(error(q, vectors(1)), rel=2e-3)
    assert float(np.min(errors)) == pytest.approx(error(better, vectors(1)), rel=2e-3)


def test_gradient_is_that_of_the_error():
    """Between thresholds: a small step in one plane changes the error as the gradient says."""
    q = quantizer.create(jax.random.key(0), DIM, 2, rotation="identity", scale="norm")
    x = vectors(1) / np.linalg.norm(vectors(1), axis=-1, keepdims=True) * DIM**0.5

    def at(angle):
        free = jnp.zeros((DIM, DIM)).at[0, 3].set(angle)
        return learned._error(q, learned._cayley(free), x)

    slope = jax.jit(jax.grad(at))(0.0)
    step = 0.02
    difference = (jax.jit(at)(step) - jax.jit(at)(-step)) / (2 * step)
    assert float(slope) == pytest.approx(float(difference), rel=0.05)


def test_samples_of_another_shape_are_refused():
    q = quantizer.create(jax.random.key(0), DIM, 2)
    for shape in ((3, 8), (DIM,), (0, DIM)):
        with pytest.raises(ValueError, match=r"samples: got .* expected \[n, 16\]"):
            learned.learn(q, jnp.zeros(shape))
