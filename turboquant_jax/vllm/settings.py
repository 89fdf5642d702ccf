"""What of a vLLM configuration is served, and the cache that it asks for."""

from dataclasses import replace
from typing import Any

from turboquant_jax.cache.config import CacheConfig, CodecConfig
from turboquant_jax.models.frequencies import inverse_frequencies
from turboquant_jax.models.huggingface_config import config_from_huggingface

BLOCK = 64
"""Tokens of a page."""
BITS = (2, 3, 4, 5, 6, 7, 8)
SINKS = 4
"""With a window; a page of 2 bits has room for that many in 32 bits."""
NAME = "turboquant"
"""Of our entry in vLLM's `additional_config`."""


def cache_config(vllm_config: Any) -> CacheConfig:
    """The cache of one layer, of the heads that this process has.

    Raises:
      ValueError: what is not served; says what is.
    """
    own = dict((vllm_config.additional_config or {}).get(NAME, {}))
    bits, window = own.pop("bits", 4), own.pop("window", 0)
    sinks = own.pop("sinks", SINKS if window else 0)
    if own or bits not in BITS or not _served(window, sinks):
        got = {"bits": bits, "window": window, "sinks": sinks} | own
        raise ValueError(
            f"additional_config[{NAME!r}]: got {got}, expected bits, one of {BITS}, window, a "
            f"multiple of {BLOCK}, and with a window sinks, 0 to {SINKS}"
        )
    _check(vllm_config)
    model = vllm_config.model_config
    described = config_from_huggingface(model.hf_config.to_dict())
    if described.sliding_window is not None:
        raise ValueError(
            f"sliding_window: got {described.sliding_window}, expected a model without"
        )
    codec = CodecConfig(bits)
    if described.head_dim & (described.head_dim - 1):
        codec = replace(codec, rotation="haar")
    return CacheConfig(
        num_layers=1,
        num_kv_heads=model.get_num_kv_heads(vllm_config.parallel_config),
        head_dim=described.head_dim,
        key=codec,
        value=codec,
        block=BLOCK,
        window=window,
        sinks=sinks,
        rope_frequencies=tuple(inverse_frequencies(described).tolist()),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def _served(window: Any, sinks: Any) -> bool:
    """Whole blocks, so that a block lies in one piece; sinks that the first page has room for."""
    if type(window) is not int or type(sinks) is not int:
        return False
    return window >= 0 and window % BLOCK == 0 and 0 <= sinks <= (SINKS if window else 0)


def _check(vllm_config: Any) -> None:
    parallel = vllm_config.parallel_config
    checks = (
        ("block_size", vllm_config.cache_config.block_size, BLOCK),
        ("kv_cache_dtype", vllm_config.cache_config.cache_dtype, "auto"),
        ("pipeline_parallel_size", parallel.pipeline_parallel_size, 1),
        ("decode_context_parallel_size", parallel.decode_context_parallel_size, 1),
        ("kv_transfer_config", vllm_config.kv_transfer_config, None),
        ("speculative_config", vllm_config.speculative_config, None),
        ("VLLM_USE_V2_MODEL_RUNNER", int(vllm_config.use_v2_model_runner), 0),
    )
    for name, got, expected in checks:
        if got != expected:
            raise ValueError(f"{name}: got {got}, expected {expected} with this backend")
