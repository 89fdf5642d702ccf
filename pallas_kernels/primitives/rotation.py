"""A rotation as the kernels multiply by it: on the tensor cores, without a rounding that counts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.primitives import triton


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RotationOperand:
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


def load_parts(refs: Any, row: jax.Array, column: jax.Array, channels: int) -> list[jax.Array]:
    """Some rows and columns of the parts of one kv head's matrix, 0 beyond the channels."""
    mask = (row < channels)[:, None] & (column < channels)[None, :]
    return [
        triton.load(refs.parts.at[part, row[:, None], column[None, :]], mask=mask, other=0.0)
        for part in range(refs.parts.shape[0])
    ]


def unrotate(
    refs: Any, parts: list[jax.Array], gain: float, y: jax.Array, row: jax.Array, channels: int
) -> jax.Array:
    """Some rows of Pi^T y, y float32 [H, columns], by the loaded columns of the parts."""
    dtype = refs.parts.dtype
    columns = 1 if dtype == jnp.float32 else 2
    operand = split(y, dtype, columns)
    out = jnp.zeros((row.shape[0], y.shape[1]), jnp.float32)
    for matrix in parts:
        out = out + merge(triton.float_dot(matrix, operand, 0, 0), columns)
    if refs.signs is None:
        return out * gain
    signs = triton.load(refs.signs.at[row], mask=row < channels, other=0.0)
    return out * (signs * gain)[:, None]
