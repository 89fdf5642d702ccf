"""Which model it is: a digest of the weights that make its keys."""

import hashlib

import jax.numpy as jnp
import numpy as np

from turboquant_jax.models.model import Layer, Llama


def key_digest(model: Llama) -> str:
    """SHA-256 over the key matrices of all layers, rounded to bfloat16.

    The same for a decoder in float32 and in bfloat16, stacked or not.
    """
    made = hashlib.sha256()
    if isinstance(model.layers, Layer):
        stacked = model.layers.qkv[...]
        matrices = (stacked[layer, :, :, -2] for layer in range(stacked.shape[0]))
    else:
        matrices = (layer.qkv[...][:, :, -2] for layer in model.layers)
    for matrix in matrices:
        made.update(np.asarray(matrix.astype(jnp.bfloat16)).tobytes())
    return made.hexdigest()
