"""A vector as its root mean square and its direction, for anything that float32 can hold."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def split(x: Float[Array, "*batch d"]) -> tuple[Float[Array, "*batch"], Float[Array, "*batch d"]]:
    """x = root * z, where z has unit mean square: root = |x| / sqrt(d). Both are float32.

    The largest magnitude is taken out first, so that squares neither overflow nor vanish. A zero
    vector has root 0 and z = 0. A vector that holds NaN or infinity has root NaN and z = 0, so
    that whatever is made of z stays finite and the root alone marks it; neighbours are untouched.
    """
    x = x.astype(jnp.float32)
    # it cancels in root and in z, hence has no gradient
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, initial=0.0))
    usable = jnp.isfinite(largest) & (largest > 0)
    x = jnp.where(usable[..., None], x / jnp.where(usable, largest, 1.0)[..., None], 0.0)
    square = jnp.mean(x * x, axis=-1)
    root = jnp.sqrt(jnp.where(usable, square, 1.0))
    return jnp.where(jnp.isfinite(largest), largest * root, jnp.nan), x / root[..., None]
