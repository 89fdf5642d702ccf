"""A vector as its root mean square and its direction, for anything that float32 can hold."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def nan_unless_finite(x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """Vectors that hold NaN or infinity as NaN in every coordinate, all others as they are."""
    return jnp.where(jnp.all(jnp.isfinite(x), axis=-1, keepdims=True), x, jnp.nan)


def split(x: Float[Array, "*batch d"]) -> tuple[Float[Array, "*batch"], Float[Array, "*batch d"]]:
    """x = root * z, where z has unit mean square: root = |x| / sqrt(d). Both are float32.

    The largest magnitude is taken out first, so that squares neither overflow nor vanish; only what
    is below float32's smallest normal number, 1.2e-38, may be flushed to zero. A zero vector has
    root 0 and z = 0. A vector that holds NaN or infinity has root NaN and z = 0, so that whatever
    is made of z stays finite and the root alone marks it; neighbours are untouched.
    """
    x = x.astype(jnp.float32)
    # it cancels in root and in z, hence has no gradient
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, initial=0.0))
    # a reciprocal of the very largest floats would be flushed to zero
    shrink = jnp.where(largest > 1, jnp.float32(0.25), jnp.float32(1))
    usable = jnp.isfinite(largest) & (largest > 0)
    divisor = jnp.where(usable, largest * shrink, 1.0)
    x = jnp.where(usable[..., None], x * shrink[..., None] / divisor[..., None], 0.0)
    square = jnp.mean(x * x, axis=-1)
    root = jnp.sqrt(jnp.where(usable, square, 1.0))
    return jnp.where(jnp.isfinite(largest), largest * root, jnp.nan), x / root[..., None]
