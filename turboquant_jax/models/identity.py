"""Which model it is: a digest of the weights that make its keys, and whether it was calibrated."""

import hashlib

import jax.numpy as jnp
import numpy as np

from turboquant_jax.cache.calibration import Calibration
from turboquant_jax.models.config import LlamaConfig
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


def require_calibrated(known: Calibration, config: LlamaConfig, model: Llama | None = None) -> None:
    """Whether a calibration is of this model; without its weights, of one of these sizes.

    Raises:
      ValueError: one of another model, or without a study.
    """
    if known.study is None or known.keys is None:
        raise ValueError("calibration: got one without a study, expected one from a file")
    sizes = config.num_layers, config.num_kv_heads, config.head_dim
    if known.keys.variance.shape != sizes:
        raise ValueError(
            f"calibration of {known.study.model}: got {known.keys.variance.shape} layers, heads "
            f"and channels, expected {sizes}"
        )
    if model is not None and (found := key_digest(model)) != known.study.weights:
        raise ValueError(
            f"calibration of {known.study.model}: got key weights {known.study.weights[:16]}, "
            f"expected those of this model, {found[:16]}"
        )
