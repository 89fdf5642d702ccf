"""TurboQuant (arXiv:2504.19874) in JAX: quantizers, a compressed KV cache, attention over it.

Importing this package touches no device and no global configuration.
"""

from turboquant_jax.attention import Scores as Scores
from turboquant_jax.attention import attend as attend
from turboquant_jax.attention import merge as merge
from turboquant_jax.cache import Cache as Cache
from turboquant_jax.cache import CacheConfig as CacheConfig
from turboquant_jax.cache import CodecConfig as CodecConfig
from turboquant_jax.cache import append as append
from turboquant_jax.cache import create as create_cache
from turboquant_jax.quantizer import Codes as Codes
from turboquant_jax.quantizer import Quantizer as Quantizer
from turboquant_jax.quantizer import create as create_quantizer
from turboquant_jax.quantizer import decode as decode
from turboquant_jax.quantizer import encode as encode
from turboquant_jax.quantizer import straight_through as straight_through
