"""A rotation as the kernels multiply by it: on the tensor cores, without a rounding that counts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotation:
    """Pi = gain * (sum of parts) * diag(signs), of all kv heads or of each.

    parts [parts, 1 or K, H, H]: +-1 with the gain of a Hadamard matrix, or a matrix as the sum of
    16-bit parts; signs float32 [H], or None for all 1. Products with 16-bit vectors are exact.
    """

    parts: Float[Array, "parts heads H H"]
    signs: Float[Array, " H"] | None = None
    gain: float = dataclasses.field(default=1.0, metadata=dict(static=True))


def merge(product: jax.Array, parts: int) -> jax.Array:
    """[rows, columns * parts] -> [rows, columns]: parts of a column lie side by side."""
    if parts == 1:
        return product
    rows, columns = product.shape
    high, low = jnp.unstack(product.reshape(rows, columns // 2, 2), axis=-1)
    return high + low


def split(x: jax.Array, dtype: Any, parts: int) -> jax.Array:
    """float32 [rows, columns] -> [rows, columns * parts] in a dtype, whose parts sum to x."""
    if parts == 1:
        return x
    high = x.astype(dtype)
    low = (x - high.astype(jnp.float32)).astype(dtype)
    return jnp.stack([high, low], axis=-1).reshape(x.shape[0], 2 * x.shape[1])
