"""The rotation of the values inside the weights, where it costs nothing at run time.

The output of attention is a weighted sum of values, and linear: with v' = Pi v it is Pi times what
it was, and (Pi o)^T (Pi w) = o^T w. So W_v takes Pi behind it and
W_o takes Pi before it, and a cache whose value codec has the rotation "identity" sees values that
are rotated already, in every segment; nothing is rotated back in a step (QuaRot, arXiv:2404.00456,
does the same). Keys cannot: RoPE stands between W_k and the cache.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from turboquant_jax.models.model import Layer, Llama
from turboquant_jax.quantizers.rotation import Rotation


def fold_value_rotation(model: Llama, rotation: Rotation) -> Llama:
    """The same decoder, up to rounding of the weights, whose values come out rotated.

    Use it with `CacheConfig(value=CodecConfig(rotation="identity"))`. One rotation serves all
    layers and heads, as in a cache. The products are made in float32, a layer at a time.

    Raises:
      ValueError: a rotation of another dimension than the heads.
    """
    if rotation.dim != model.config.head_dim:
        raise ValueError(
            f"got a rotation of dimension {rotation.dim}, expected head_dim {model.config.head_dim}"
        )

    def fold(layer: Layer) -> Layer:
        qkv, outputs = layer.qkv[...], layer.o[...]
        folded = jax.tree.map(lambda x: x, layer)
        folded.qkv = nnx.Param(qkv.at[:, :, -1].set(_rotate(rotation, qkv[:, :, -1])))
        if layer.qkv_bias is not None:  # values are a sum of both, and a rotation is linear
            bias = layer.qkv_bias[...]
            folded.qkv_bias = nnx.Param(bias.at[:, -1].set(_rotate(rotation, bias[:, -1])))
        folded.o = nnx.Param(jnp.swapaxes(_rotate(rotation, jnp.swapaxes(outputs, 1, 2)), 1, 2))
        return folded

    folded = jax.tree.map(lambda x: x, model)
    if isinstance(model.layers, Layer):
        folded.layers = jax.jit(lambda layers: lax.map(fold, layers))(model.layers)
    else:
        compiled = jax.jit(fold)
        folded.layers = nnx.List([compiled(layer) for layer in model.layers])
    return folded


def _rotate(rotation: Rotation, x: Float[Array, "*batch H"]) -> Float[Array, "*batch H"]:
    return rotation.apply(x.astype(jnp.float32)).astype(x.dtype)
