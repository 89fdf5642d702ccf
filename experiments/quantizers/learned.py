"""A rotation learned from sample vectors: gradient steps on the orthogonal group (an ablation).

The rotation is R0 times the Cayley transform (I - A/2)^-1 (I + A/2) of a skew A, orthogonal for
every A, and what is minimised is the mean relative error of the quantizer on the samples, with the
codes held fixed within a step: the gradient between decision thresholds, across which the error of
a nearest level is continuous. Straight-through gradients would be useless here, because with
identity gradients |x - Pi^T (Pi x + e)| = |e| does not depend on Pi.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from turboquant_jax.quantizers import direction
from turboquant_jax.quantizers import quantizer as quantizers
from turboquant_jax.quantizers.quantizer import Quantizer
from turboquant_jax.quantizers.rotation import Identity, Orthogonal

Matrix = Float[Array, "d d"]


def learn(
    quantizer: Quantizer,
    samples: Float[Array, "n d"],
    *,
    steps: int = 100,
    learning_rate: float = 0.01,
) -> tuple[Orthogonal, Float[Array, " steps"]]:
    """Improve the quantizer's rotation on sample vectors with Adam.

    Args:
      quantizer: where to start, and the levels, code and scale mode to train for.
      samples: finite vectors that are not zero; all of them are used in every step.
      steps: number of gradient steps.
      learning_rate: of Adam, on the entries of A (radians).

    Returns:
      The rotation of least error on the way, orthogonal to float32 rounding, and the relative
      error before each step: the first one is that of the quantizer as given.

    Raises:
      ValueError: samples that are not [n, d] with n >= 1.
    """
    if samples.ndim != 2 or samples.shape[0] < 1 or samples.shape[1] != quantizer.dim:
        raise ValueError(f"samples: got shape {samples.shape}, expected [n, {quantizer.dim}]")
    start = quantizer.rotation.apply(jnp.eye(quantizer.dim)).T
    _, unit = direction.split(samples)
    # compiled once for every start
    levels_only = replace(quantizer, rotation=Identity(quantizer.dim))
    matrix, errors = _descend(levels_only, start, unit, steps, learning_rate)
    return Orthogonal(matrix), errors


@partial(jax.jit, static_argnames="steps")
def _descend(
    quantizer: Quantizer,
    start: Matrix,
    unit: Float[Array, "n d"],
    steps: int,
    learning_rate: float,
) -> tuple[Matrix, Float[Array, " steps"]]:
    optimizer = optax.adam(learning_rate)

    def loss(free: Matrix) -> Float[Array, ""]:
        return _error(quantizer, _matmul(_cayley(free), start), unit)

    def step(carry: tuple, _: None) -> tuple[tuple, Float[Array, ""]]:
        free, state, best, least = carry
        error, gradient = jax.value_and_grad(loss)(free)
        best = jnp.where(error < least, free, best)
        with jax.numpy_dtype_promotion("standard"):  # Adam takes a float to an integer power
            updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(free, updates), state, best, jnp.minimum(error, least)), error

    free = jnp.zeros_like(start)
    carry: tuple = (free, optimizer.init(free), free, jnp.float32(jnp.inf))
    carry, errors = lax.scan(step, carry, length=steps)
    matrix = _matmul(_cayley(carry[2]), start)
    # one Newton-Schulz step takes out the rounding of the solve
    return 1.5 * matrix - 0.5 * _matmul(matrix, _matmul(matrix.T, matrix)), errors


_matmul = partial(jnp.matmul, precision="highest")


def _cayley(free: Matrix) -> Matrix:
    """(I - A/2)^-1 (I + A/2) of the skew part A = free - free^T."""
    half, one = (free - free.T) / 2, jnp.eye(len(free))
    return jnp.linalg.solve(one - half, one + half)


def _error(quantizer: Quantizer, matrix: Matrix, unit: Float[Array, "n d"]) -> Float[Array, ""]:
    """Mean relative error of the quantizer, rotated by `matrix`, on vectors of mean square 1."""
    z = Orthogonal(matrix).apply(unit)
    c = quantizers.code_levels(quantizer, quantizers.assign(quantizer, lax.stop_gradient(z)))
    return jnp.mean(jnp.square(z - quantizers.correction(quantizer, z, c)[..., None] * c))
