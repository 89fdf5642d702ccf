"""The immutable compressed cache: static config, state, updating, paging, exact byte counts."""

from turboquant_jax.cache.allocation import Allocation as Allocation
from turboquant_jax.cache.allocation import allocate as allocate
from turboquant_jax.cache.calibration import Calibration as Calibration
from turboquant_jax.cache.config import CacheConfig as CacheConfig
from turboquant_jax.cache.config import CodecConfig as CodecConfig
from turboquant_jax.cache.config import Format as Format
from turboquant_jax.cache.presets import Preset as Preset
from turboquant_jax.cache.presets import preset as preset
from turboquant_jax.cache.sharing import fork as fork
from turboquant_jax.cache.sharing import free as free
from turboquant_jax.cache.sharing import free_pages as free_pages
from turboquant_jax.cache.state import Cache as Cache
from turboquant_jax.cache.state import create as create
from turboquant_jax.cache.updating import append as append
from turboquant_jax.cache.updating import begin as begin
from turboquant_jax.cache.updating import commit as commit
from turboquant_jax.cache.updating import write as write
