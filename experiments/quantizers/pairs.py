"""Pairs of vectors with their true and their estimated inner products."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from turboquant_jax.quantizers import prod, quantizer

RHOS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
"""Inner products of correlated pairs."""
SKETCHES: dict[str, Any] = {"prod_gaussian": "gaussian", "prod_orthogonal": "orthogonal"}
"""Estimators that are TurboQuant-prod; any other is a scale mode of TurboQuant-mse."""


def _estimate(
    key: Array, estimator: Any, bits: int, x: Float[Array, "n d"], v: Float[Array, "n d"]
) -> Float[Array, " n"]:
    """<v, x~> of every pair, scales in float32."""
    dim = x.shape[1]
    if estimator in SKETCHES:
        code = prod.create(key, dim, bits, sketch=SKETCHES[estimator], scale_dtype=jnp.float32)
        decoded = prod.decode(code, prod.encode(code, x))
    else:
        plain = quantizer.create(key, dim, bits, scale=estimator, scale_dtype=jnp.float32)
        decoded = quantizer.decode(plain, quantizer.encode(plain, x))
    return jnp.sum(v * decoded, axis=1)


@partial(jax.jit, static_argnames=("dim", "estimator", "bits", "pairs"))
def sphere(
    keys: Array, dim: int, estimator: Any, bits: int, pairs: int
) -> tuple[Float[Array, "batches groups pairs"], Float[Array, "batches groups pairs"]]:
    """True and estimated <v, x>; groups are uniform v, then each of RHOS."""

    def batch(key):
        code_key, x_key, v_key = jax.random.split(key, 3)
        shape = (len(RHOS) + 1, pairs, dim)
        x = _unit(jax.random.normal(x_key, shape))
        v = _unit(jax.random.normal(v_key, shape))
        rho = jnp.asarray(RHOS)[:, None, None]
        across = _unit(v[1:] - jnp.sum(v[1:] * x[1:], axis=-1, keepdims=True) * x[1:])
        v = jnp.concatenate([v[:1], rho * x[1:] + jnp.sqrt(1 - rho**2) * across])
        flat = _estimate(code_key, estimator, bits, x.reshape(-1, dim), v.reshape(-1, dim))
        return jnp.sum(x * v, axis=-1), flat.reshape(shape[:-1])

    return jax.lax.map(batch, keys)


@partial(jax.jit, static_argnames=("estimator", "bits", "pairs"))
def neighbours(
    keys: Array, pool: Float[Array, "n d"], estimator: Any, bits: int, pairs: int
) -> tuple[Float[Array, "batches pairs"], Float[Array, "batches pairs"]]:
    """Random vectors of the pool with their nearest neighbours in it."""
    similar = jnp.einsum("id,jd->ij", pool, pool) - 2 * jnp.eye(len(pool))
    nearest = jnp.argmax(similar, axis=1)

    def batch(key):
        code_key, row_key = jax.random.split(key)
        rows = jax.random.choice(row_key, len(pool), (pairs,), replace=False)
        x, v = pool[rows], pool[nearest[rows]]
        return jnp.sum(x * v, axis=-1), _estimate(code_key, estimator, bits, x, v)

    return jax.lax.map(batch, keys)


def _unit(x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
