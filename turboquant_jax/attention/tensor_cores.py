"""Rotations of heads as products of bfloat16, which tensor cores take, where that is the dtype."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from turboquant_jax.attention import head_rotation
from turboquant_jax.cache import kernel_operands
from turboquant_jax.cache.codec import Codec


def rotate(
    codec: Codec, rows: Int[Array, " K"], query: Float[Array, "B T N H"]
) -> Float[Array, "B T N H"]:
    """Queries in the rotated space of the keys, float32; on the tensor cores from bfloat16."""
    if query.dtype != jnp.bfloat16 or codec.uncoded is not None:
        return head_rotation.rotate_queries(codec, rows, query)
    rotation = kernel_operands.of_codec(codec, rows)
    if rotation.signs is not None:
        query = query * rotation.signs.astype(query.dtype)[None, None, None, :]
    return rotation.gain * _products("btkgi,kji->btkgj", query, rotation.parts)


def unrotate(
    codec: Codec, rows: Int[Array, " K"], output: Float[Array, "B T N H"], dtype: str
) -> Float[Array, "B T N H"]:
    """Outputs back from the rotated space, float32; on the tensor cores to bfloat16."""
    if dtype != "bfloat16" or codec.uncoded is not None:
        return head_rotation.unrotate_outputs(codec, rows, output)
    rotation = kernel_operands.of_codec(codec, rows)
    rotated = _products("kji,btkgj->btkgi", output.astype(jnp.bfloat16), rotation.parts)
    rotated = rotated * rotation.gain
    return rotated if rotation.signs is None else rotated * rotation.signs[None, None, None, :]


def _products(
    equation: str, x: Float[Array, "B T N H"], parts: Float[Array, "parts heads H H"]
) -> Float[Array, "B T N H"]:
    """Each head by its matrix, whose parts add up, in float32."""
    grouped = x.reshape(*x.shape[:2], parts.shape[1], -1, x.shape[3])
    total = jnp.zeros(grouped.shape, jnp.float32)
    for part in parts:
        pair = (grouped, part) if equation.startswith("btkg") else (part, grouped)
        total = total + jnp.einsum(equation, *pair, preferred_element_type=jnp.float32)
    return total.reshape(x.shape)
