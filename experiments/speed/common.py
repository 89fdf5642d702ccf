"""What experiments on speed share: an 8B model's sizes, the vendor's attention, a check."""

import jax

from turboquant_jax.cache import CacheConfig, CodecConfig

LAYERS, HEADS, KV_HEADS, CHANNELS = 32, 32, 8, 128
FREQUENCIES = tuple(5e5 ** -(i / (CHANNELS // 2)) for i in range(CHANNELS // 2))
_NEAR = 5e-3


def vendor(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = False) -> jax.Array:
    """cuDNN's attention in bfloat16: q [B, T, N, H], k and v [B, S, K, H]."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")


def require_near(what: str, error: float) -> None:
    """A kernel that is wrong is not timed: ValueError unless its relative error is small."""
    print(f"check {what}: relative error {error:.1e}", flush=True)
    if not error < _NEAR:
        raise ValueError(f"{what}: got relative error {error}, expected below {_NEAR}")


def cache_config(layers: int, bits: int, mean: str) -> CacheConfig:
    """The default cache at so many bits; `mean` of its keys: "pre_rope", else that of stored."""
    codec, turned = CodecConfig(bits), FREQUENCIES if mean == "pre_rope" else None
    return CacheConfig(layers, KV_HEADS, CHANNELS, codec, codec, rope_frequencies=turned)
