"""TurboQuant (arXiv:2504.19874) in JAX: quantizers, a compressed KV cache, attention over it.

Importing this package touches no device and no global configuration.
"""

from turboquant_jax.attention import Scores, attend, merge
from turboquant_jax.cache import Cache, CacheConfig, CodecConfig, append, preset
from turboquant_jax.cache import create as create_cache
from turboquant_jax.quantizer import Codes, Quantizer, decode, encode, straight_through
from turboquant_jax.quantizer import create as create_quantizer

__all__ = [
    "Cache",
    "CacheConfig",
    "CodecConfig",
    "Codes",
    "Quantizer",
    "Scores",
    "append",
    "attend",
    "create_cache",
    "create_quantizer",
    "decode",
    "encode",
    "merge",
    "preset",
    "straight_through",
]
