"""TurboQuant (arXiv:2504.19874) in JAX: quantizers, a compressed KV cache, attention over it.

Importing this package touches no device and no global configuration, and does not import JAX:
a name is loaded when it is first used.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same names for type checkers
    from turboquant_jax.attention import (
        Projection,
        Scores,
        attend,
        attend_and_write,
        attend_projection,
    )
    from turboquant_jax.attention import merge as merge_segments
    from turboquant_jax.attention.teacher_forcing import teacher_forced
    from turboquant_jax.cache import Allocation, Cache, CacheConfig, CodecConfig, Format, preset
    from turboquant_jax.cache import append as append_tokens
    from turboquant_jax.cache import begin as begin_append
    from turboquant_jax.cache import commit as commit_append
    from turboquant_jax.cache import create as create_cache
    from turboquant_jax.cache import fork as fork_sequence
    from turboquant_jax.cache import free as free_sequences
    from turboquant_jax.cache import free_pages as count_free_pages
    from turboquant_jax.cache import propose as propose_tokens
    from turboquant_jax.cache import write as write_tokens
    from turboquant_jax.cache.bytes import compression_ratio, count_bytes, planned_bytes
    from turboquant_jax.cache.storage import restore as restore_cache
    from turboquant_jax.cache.storage import save as save_cache
    from turboquant_jax.quantizers.quantizer import Codes, Quantizer, straight_through
    from turboquant_jax.quantizers.quantizer import create as create_quantizer
    from turboquant_jax.quantizers.quantizer import decode as decode_vectors
    from turboquant_jax.quantizers.quantizer import encode as encode_vectors
else:
    from turboquant_jax import lazy

    _NAMES = {
        "Allocation": ("turboquant_jax.cache", "Allocation"),
        "Cache": ("turboquant_jax.cache", "Cache"),
        "CacheConfig": ("turboquant_jax.cache", "CacheConfig"),
        "CodecConfig": ("turboquant_jax.cache", "CodecConfig"),
        "Codes": ("turboquant_jax.quantizers.quantizer", "Codes"),
        "Format": ("turboquant_jax.cache", "Format"),
        "Projection": ("turboquant_jax.attention", "Projection"),
        "Quantizer": ("turboquant_jax.quantizers.quantizer", "Quantizer"),
        "Scores": ("turboquant_jax.attention", "Scores"),
        "append_tokens": ("turboquant_jax.cache", "append"),
        "attend": ("turboquant_jax.attention", "attend"),
        "attend_and_write": ("turboquant_jax.attention", "attend_and_write"),
        "attend_projection": ("turboquant_jax.attention", "attend_projection"),
        "begin_append": ("turboquant_jax.cache", "begin"),
        "commit_append": ("turboquant_jax.cache", "commit"),
        "compression_ratio": ("turboquant_jax.cache.bytes", "compression_ratio"),
        "count_bytes": ("turboquant_jax.cache.bytes", "count_bytes"),
        "count_free_pages": ("turboquant_jax.cache", "free_pages"),
        "create_cache": ("turboquant_jax.cache", "create"),
        "create_quantizer": ("turboquant_jax.quantizers.quantizer", "create"),
        "decode_vectors": ("turboquant_jax.quantizers.quantizer", "decode"),
        "encode_vectors": ("turboquant_jax.quantizers.quantizer", "encode"),
        "fork_sequence": ("turboquant_jax.cache", "fork"),
        "free_sequences": ("turboquant_jax.cache", "free"),
        "merge_segments": ("turboquant_jax.attention", "merge"),
        "planned_bytes": ("turboquant_jax.cache.bytes", "planned_bytes"),
        "preset": ("turboquant_jax.cache", "preset"),
        "propose_tokens": ("turboquant_jax.cache", "propose"),
        "restore_cache": ("turboquant_jax.cache.storage", "restore"),
        "save_cache": ("turboquant_jax.cache.storage", "save"),
        "straight_through": ("turboquant_jax.quantizers.quantizer", "straight_through"),
        "teacher_forced": ("turboquant_jax.attention.teacher_forcing", "teacher_forced"),
        "write_tokens": ("turboquant_jax.cache", "write"),
    }
    __getattr__, __dir__ = lazy.names(__name__, _NAMES)

__all__ = [
    "Allocation",
    "Cache",
    "CacheConfig",
    "CodecConfig",
    "Codes",
    "Format",
    "Projection",
    "Quantizer",
    "Scores",
    "append_tokens",
    "attend",
    "attend_and_write",
    "attend_projection",
    "begin_append",
    "commit_append",
    "compression_ratio",
    "count_bytes",
    "count_free_pages",
    "create_cache",
    "create_quantizer",
    "decode_vectors",
    "encode_vectors",
    "fork_sequence",
    "free_sequences",
    "merge_segments",
    "planned_bytes",
    "preset",
    "propose_tokens",
    "restore_cache",
    "save_cache",
    "straight_through",
    "teacher_forced",
    "write_tokens",
]
