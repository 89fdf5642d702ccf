"""What experiments on speed share: an 8B model's sizes, the vendor's attention, a check."""

from typing import Literal

import jax
import jax.numpy as jnp

from turboquant_jax import attention
from turboquant_jax.cache import CacheConfig, Calibration, CodecConfig
from turboquant_jax.models.timing import filled_cache

Code = Literal["scalar", "trellis"]
LAYERS, HEADS, KV_HEADS, CHANNELS = 32, 32, 8, 128
FREQUENCIES = tuple(5e5 ** -(i / (CHANNELS // 2)) for i in range(CHANNELS // 2))
_NEAR = 5e-3


def vendor(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = False) -> jax.Array:
    """cuDNN's attention in bfloat16: q [B, T, N, H], k and v [B, S, K, H]."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")


def cache_config(
    layers: int, bits: int | tuple[int, int], mean: str = "", code: Code = "scalar"
) -> CacheConfig:
    """The default cache at so many bits; `mean` of its keys: "pre_rope", else that of stored."""
    key, value = (bits, bits) if isinstance(bits, int) else bits
    codecs = CodecConfig(key, code=code), CodecConfig(value, code=code)
    turned = FREQUENCIES if mean == "pre_rope" else None
    return CacheConfig(layers, KV_HEADS, CHANNELS, *codecs, rope_frequencies=turned)


def check(config: CacheConfig, known: Calibration | None = None, tokens: int = 1) -> None:
    """A kernel that is wrong is not timed: attention by it against the definition, on the device.

    So many new tokens of three sequences that end inside a block, pages in random order.

    Raises:
      ValueError: a relative error of the output that is not small.
    """
    state = filled_cache(config, 3, 1000, 1016, known)
    pages = jax.random.permutation(jax.random.key(1), jnp.arange(state.table.page_table.size))
    table = state.table.page_table
    table = jnp.where(table >= 0, pages.astype(table.dtype)[table], table)
    state = state.with_lengths(jnp.array([1000, 777, 220], jnp.int32)).with_table(page_table=table)
    q = jax.random.normal(jax.random.key(2), (3, tokens, HEADS, CHANNELS))
    k, v = jax.random.normal(jax.random.key(3), (2, 3, tokens, KV_HEADS, CHANNELS))
    run = jax.jit(attention.attend, static_argnames=("layer", "implementation"))
    with jax.default_matmul_precision("highest"):
        want = run(state, 0, q, k, v, implementation="xla")
    got = run(state, 0, q, k, v, implementation="pallas")
    error = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
    what = f"check K{config.key.bits} V{config.value.bits} {config.key.code}, {tokens} new tokens"
    if config.allocation is not None:
        what = f"check heads of {len(config.formats)} formats, {config.key.code} keys"
    print(f"{what}: relative error {error:.1e}", flush=True)
    if not error < _NEAR:
        raise ValueError(f"{what}: got relative error {error}, expected below {_NEAR}")
