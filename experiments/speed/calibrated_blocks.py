"""Heads of several calibrated formats in the sizes of an 8B model: 7 times fewer bytes."""

from dataclasses import replace
from statistics import fmean

import jax
import jax.numpy as jnp

from experiments.speed.common import CHANNELS, FREQUENCIES, KV_HEADS, Code
from pallas_kernels.decode_attention import PagedBlocks
from turboquant_jax.attention import kernel_call
from turboquant_jax.cache import Allocation, CacheConfig, CodecConfig
from turboquant_jax.cache import calibration as calibrations
from turboquant_jax.cache import create as create_cache
from turboquant_jax.cache.allocation import Groups, mean_bits
from turboquant_jax.cache.state import rows_of

# (keys, values): of the formats that `experiments/calibrations/smollm2-135m.safetensors` gives most
# heads, with twice the channels, those that make 69 bytes of codes a token and head, and 4 of
# scales: 512 / 73 = 7.01 times less than bfloat16.
_SPLIT: Groups = ((32, 4), (32, 2), (64, 1))
FORMATS: tuple[tuple[Groups, int], ...] = (
    (_SPLIT, 2),
    (_SPLIT, 3),
    (((32, 4), (32, 3), (64, 2)), 2),
    (((64, 2), (64, 1)), 2),
)
MEAN_BITS = (fmean(mean_bits(key) for key, _ in FORMATS), fmean(bits for _, bits in FORMATS))
CODES: dict[str, tuple[Code, Code]] = {
    "pallas-7x": ("trellis", "trellis"),
    "pallas-7x-scalar-keys": ("scalar", "trellis"),
    "pallas-7x-scalar": ("scalar", "scalar"),
}
"""Codes of keys and values by the name of what is measured; those of the calibration first."""


def config_of(codes: tuple[Code, Code]) -> CacheConfig:
    """One layer, whose heads have the formats in turn; the exact mean."""
    heads = [FORMATS[head % len(FORMATS)] for head in range(KV_HEADS)]
    keys, values = zip(*heads, strict=True)
    key, value = (CodecConfig(code=code, scales="joint_products") for code in codes)
    return CacheConfig(
        1,
        KV_HEADS,
        CHANNELS,
        key,
        value,
        rope_frequencies=FREQUENCIES,
        allocation=Allocation((keys,), (values,)),
    )


def calibration() -> calibrations.Calibration:
    """A basis for every head, which its groups need."""
    return calibrations.identity(1, KV_HEADS, CHANNELS)


def random_heads(key: jax.Array, codes: tuple[Code, Code], table: jax.Array, tokens: int):
    """Heads of all formats with random codes and scales near 1, in the pages of a table."""
    shapes = jax.eval_shape(
        lambda: create_cache(
            config_of(codes), 1, 1024, key=jax.random.key(0), num_pages=table.size,
            calibration=calibration(),
        )
    )  # fmt: skip
    leaves, tree = jax.tree.flatten([part.pool for part in shapes.parts])
    keys = jax.random.split(key, len(leaves))
    pools = jax.tree.unflatten(tree, [_random(*pair) for pair in zip(keys, leaves, strict=True)])
    parts = [replace(part, pool=pool) for part, pool in zip(shapes.parts, pools, strict=True)]
    lengths = jnp.full((table.shape[0],), tokens, jnp.int32)
    rows = rows_of(shapes, 0)
    pools = tuple(kernel_call.blocks_of(parts[member.part]) for member in rows.members)
    return PagedBlocks(pools, table, lengths, heads=rows.places(KV_HEADS))


def _random(key: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if leaf.dtype == jnp.uint8:
        return jax.random.bits(key, leaf.shape, jnp.uint8)
    scale = jax.random.uniform(key, (2, *leaf.shape), minval=0.5, maxval=1.5)
    words = jax.lax.bitcast_convert_type(scale.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
    return words[0] << 16 | words[1]
