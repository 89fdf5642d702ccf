"""TurboQuant (arXiv:2504.19874) in JAX: quantizers, a compressed KV cache, attention over it.

Importing this package touches no device and no global configuration, and does not import JAX:
a name is loaded when it is first used.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same names for type checkers
    from turboquant_jax.attention import Scores, attend, merge
    from turboquant_jax.cache import Cache, CacheConfig, CodecConfig, append, preset
    from turboquant_jax.cache import create as create_cache
    from turboquant_jax.quantizers.quantizer import (
        Codes,
        Quantizer,
        decode,
        encode,
        straight_through,
    )
    from turboquant_jax.quantizers.quantizer import create as create_quantizer
else:
    from turboquant_jax import lazy

    _NAMES = {
        "Cache": ("turboquant_jax.cache", "Cache"),
        "CacheConfig": ("turboquant_jax.cache", "CacheConfig"),
        "CodecConfig": ("turboquant_jax.cache", "CodecConfig"),
        "Codes": ("turboquant_jax.quantizers.quantizer", "Codes"),
        "Quantizer": ("turboquant_jax.quantizers.quantizer", "Quantizer"),
        "Scores": ("turboquant_jax.attention", "Scores"),
        "append": ("turboquant_jax.cache", "append"),
        "attend": ("turboquant_jax.attention", "attend"),
        "create_cache": ("turboquant_jax.cache", "create"),
        "create_quantizer": ("turboquant_jax.quantizers.quantizer", "create"),
        "decode": ("turboquant_jax.quantizers.quantizer", "decode"),
        "encode": ("turboquant_jax.quantizers.quantizer", "encode"),
        "merge": ("turboquant_jax.attention", "merge"),
        "preset": ("turboquant_jax.cache", "preset"),
        "straight_through": ("turboquant_jax.quantizers.quantizer", "straight_through"),
    }
    __getattr__, __dir__ = lazy.names(__name__, _NAMES)

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
