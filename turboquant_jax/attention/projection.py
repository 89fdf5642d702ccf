"""What a layer of a decoder projected, and the rotary embedding on its way to attention."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax.tree_util import register_dataclass
from jaxtyping import Array, Float

Heads = tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]
"""Queries, keys and values, after RoPE."""


@register_dataclass
@dataclass(frozen=True)
class Projection:
    """Queries, keys and values of T tokens before RoPE, side by side.

    Whoever attends takes them apart: a kernel may turn them on the way.

    Attributes:
      qkv: [B, T, K, G+2, H], of each kv head its G queries, its key and its value.
      cos, sin: [B, T, H/2], of the angle of every pair of channels at the tokens' positions.
    """

    qkv: Float[Array, "B T K group H"]
    cos: Float[Array, "B T H/2"]
    sin: Float[Array, "B T H/2"]

    def heads(self) -> Heads:
        """Queries and keys after RoPE, and values."""
        batch, tokens, *_, dim = self.qkv.shape
        q = self.qkv[..., :-2, :].reshape(batch, tokens, -1, dim)
        k, v = self.qkv[..., -2, :], self.qkv[..., -1, :]
        return apply_rope(q, self.cos, self.sin), apply_rope(k, self.cos, self.sin), v


def apply_rope(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T H/2"], sin: Float[Array, "B T H/2"]
) -> Float[Array, "B T N H"]:
    """Rotate the channel pairs (i, i + H/2) of every head; computed in float32, cast back."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
