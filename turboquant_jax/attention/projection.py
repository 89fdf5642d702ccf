"""What a layer of a decoder projected, and the rotary embedding on its way to attention."""

from dataclasses import dataclass, field

import jax.numpy as jnp
from jax.tree_util import register_dataclass
from jaxtyping import Array, Float

from turboquant_jax.attention.segments import PLAIN, Scores

Heads = tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]
"""Queries, keys and values, after RoPE."""


@register_dataclass
@dataclass(frozen=True)
class Projection:
    """Queries, keys and values of T tokens before RoPE, side by side, and how they attend.

    Whoever attends takes them apart: a kernel may turn them on the way. Biases and norms of the
    heads are in them already.

    Attributes:
      qkv: [B, T, K, G+2, H], of each kv head its G queries, its key and its value.
      cos, sin: [B, T, R/2], of the angle of every pair of channels at the tokens' positions,
        times the factor of YaRN where there is one. RoPE turns the first R <= H channels.
      scores: the model's scale and soft cap.
      sliding_window: tokens that a query sees in this layer, itself included; None = all of them.
    """

    qkv: Float[Array, "B T K group H"]
    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]
    scores: Scores = field(default=PLAIN, metadata={"static": True})
    sliding_window: int | None = field(default=None, metadata={"static": True})

    def heads(self) -> Heads:
        """Queries and keys after RoPE, and values."""
        batch, tokens, *_, dim = self.qkv.shape
        q = self.qkv[..., :-2, :].reshape(batch, tokens, -1, dim)
        k, v = self.qkv[..., -2, :], self.qkv[..., -1, :]
        return apply_rope(q, self.cos, self.sin), apply_rope(k, self.cos, self.sin), v


def apply_rope(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T N H"]:
    """Rotate the pairs (i, i + R/2) of the first R channels; computed in float32, cast back."""
    turned = 2 * cos.shape[-1]
    first, second = jnp.split(x[..., :turned].astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    whole = jnp.concatenate(rotated, axis=-1).astype(x.dtype)
    return whole if turned == x.shape[-1] else jnp.concatenate([whole, x[..., turned:]], axis=-1)
