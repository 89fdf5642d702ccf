"""The immutable compressed cache: static config, state, appending, paging, exact byte counts."""

from turboquant_jax.cache.config import CacheConfig as CacheConfig
from turboquant_jax.cache.config import CodecConfig as CodecConfig
from turboquant_jax.cache.state import Cache as Cache
from turboquant_jax.cache.state import append as append
from turboquant_jax.cache.state import begin as begin
from turboquant_jax.cache.state import commit as commit
from turboquant_jax.cache.state import create as create
from turboquant_jax.cache.state import write as write
