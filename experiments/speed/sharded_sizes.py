"""The largest past of a decoder on a mesh: planned for each device's memory, then allocated."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import Mesh

from experiments.speed.llama_sizes import size
from experiments.speed.sharded_decoder import Decoder, collect
from turboquant_jax.cache import CacheConfig, CodecConfig, presets
from turboquant_jax.cache.mesh import local_config
from turboquant_jax.models.config import LlamaConfig
from turboquant_jax.models.rope import centring
from turboquant_jax.models.sharding import parameters_of_shard

_SHARES = (0.97, 0.9, 0.8)  # of the memory, one after another until one fits
_BESIDE = 2**29  # bytes for the compiler's temporaries
DENSE = "bf16"


def cache_config(llama: LlamaConfig, name: str) -> CacheConfig | None:
    """The cache by its name: bits, or a preset; None for the dense past. Values rotated already."""
    if name == DENSE:
        return None
    sizes = llama.num_layers, llama.num_kv_heads, llama.head_dim
    key = value = CodecConfig(int(name)) if name.isdigit() else None
    if key is None or value is None:
        key, value = presets.codecs(name)  # type: ignore[arg-type]
    return CacheConfig(*sizes, key, replace(value, rotation="identity"), **centring(llama))


def planned(
    llama: LlamaConfig, mesh: Mesh, case: str, name: str, steps: int, share: float = _SHARES[0]
) -> Decoder:
    """The decoder of a case, "longest" or "largest32768", that fits a share of the memory."""
    stats = jax.devices()[0].memory_stats()
    if stats is None:
        raise ValueError("got a device that does not report its memory, expected a GPU")
    free = int(share * stats["bytes_limit"]) - 2 * parameters_of_shard(llama, mesh) - _BESIDE
    cache, four = (cache_config(llama, each) for each in (name, "4"))
    assert four is not None
    own = None if cache is None else local_config(cache, mesh)
    batch, tokens = size(case, local_config(four, mesh), own, steps + 1, free)
    return Decoder(llama, cache, mesh, batch, tokens, steps)


def largest(
    llama: LlamaConfig, mesh: Mesh, case: str, name: str, steps: int, model: Callable[[], Any]
) -> tuple[Decoder, float] | None:
    """What fits, and seconds of a step; None where nothing does. `model()` gives the weights."""
    for share in _SHARES:
        decoder = planned(llama, mesh, case, name, steps, share)
        print(f"{case} {name}: {decoder.batch} x {decoder.tokens}", flush=True)
        try:
            seconds = decoder.loop(model(), decoder.compiled()).median(1)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"  at {share}: {str(error)[:200]}", flush=True)
            collect()
            continue
        stats = jax.devices()[0].memory_stats() or {}
        print(f"  peak {stats.get('peak_bytes_in_use')} of {stats.get('bytes_limit')}", flush=True)
        collect()
        return decoder, seconds
    return None
