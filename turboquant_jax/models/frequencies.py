"""How fast RoPE turns each pair of channels of a model. Needs no JAX."""

import numpy as np

from turboquant_jax.models.config import LlamaConfig


def inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians per position of each channel pair: float64 [R/2], `theta**(-2i/R)`, or scaled.

    R, `config.rotated_channels`, is the head dim unless the embedding is partial.
    """
    channels, theta = config.rotated_channels, config.rope_theta
    frequencies = theta ** -(np.arange(0, channels, 2, dtype=np.float64) / channels)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    return frequencies / np.array(scaling.divisors(frequencies.tolist(), theta))
