"""The immutable compressed cache: static config, state, updating, paging, exact byte counts."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same names for type checkers
    from turboquant_jax.cache.allocation import Allocation, allocate
    from turboquant_jax.cache.calibration import Calibration
    from turboquant_jax.cache.calibration_file import load_calibration, save_calibration
    from turboquant_jax.cache.config import CacheConfig, CodecConfig, Format
    from turboquant_jax.cache.presets import Preset, preset
    from turboquant_jax.cache.sharing import fork, free, free_pages, repeat, shared_blocks
    from turboquant_jax.cache.state import Cache, create
    from turboquant_jax.cache.updating import append, begin, commit, propose, write
else:  # loaded when they are first used: the configuration alone needs no JAX
    from turboquant_jax import lazy

    _MODULES = {
        "allocation": ("Allocation", "allocate"),
        "calibration": ("Calibration",),
        "calibration_file": ("load_calibration", "save_calibration"),
        "config": ("CacheConfig", "CodecConfig", "Format"),
        "presets": ("Preset", "preset"),
        "sharing": ("fork", "free", "free_pages", "repeat", "shared_blocks"),
        "state": ("Cache", "create"),
        "updating": ("append", "begin", "commit", "propose", "write"),
    }
    __getattr__, __dir__ = lazy.names(
        __name__,
        {name: (f"{__name__}.{module}", name) for module, own in _MODULES.items() for name in own},
    )

__all__ = [
    "Allocation",
    "Cache",
    "CacheConfig",
    "Calibration",
    "CodecConfig",
    "Format",
    "Preset",
    "allocate",
    "append",
    "begin",
    "commit",
    "create",
    "fork",
    "free",
    "free_pages",
    "load_calibration",
    "preset",
    "propose",
    "repeat",
    "save_calibration",
    "shared_blocks",
    "write",
]
