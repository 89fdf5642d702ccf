"""Heads of several calibrated formats in the sizes of an 8B model: 7 times fewer bytes."""

from dataclasses import dataclass, replace
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

_SPLIT: Groups = ((32, 4), (32, 2), (64, 1))
# (keys, values): of the formats that `experiments/calibrations/smollm2-135m.safetensors` gives most
# heads, with twice the channels.
FOUR: tuple[tuple[Groups, int], ...] = (
    (_SPLIT, 2),
    (_SPLIT, 3),
    (((32, 4), (32, 3), (64, 2)), 2),
    (((64, 2), (64, 1)), 2),
)


@dataclass(frozen=True)
class Mix:
    """Heads that have some (keys, values) in turn, and a code."""

    code: Code
    formats: tuple[tuple[Groups, int], ...]

    @property
    def bits(self) -> tuple[float, float]:
        """Of a channel of keys, and of values, the mean over heads."""
        keys, values = zip(*self.formats, strict=True)
        return fmean(map(mean_bits, keys)), fmean(values)


# Four make 69 bytes of codes a token and head, and two 68, beside 4 of scales: 512 / 73 = 7.01 and
# 512 / 72 = 7.11 times less than bfloat16. Most layers of the calibrations here have two or fewer.
MIXES: dict[str, Mix] = {
    "pallas-7x": Mix("trellis", FOUR),
    "pallas-7x-scalar": Mix("scalar", FOUR),
    "pallas-7x-two": Mix("trellis", FOUR[1::2]),
    "pallas-7x-scalar-two": Mix("scalar", FOUR[1::2]),
}
"""By the name of what is measured."""


def config_of(mix: Mix) -> CacheConfig:
    """One layer of such heads; the exact mean."""
    heads = [mix.formats[head % len(mix.formats)] for head in range(KV_HEADS)]
    keys, values = zip(*heads, strict=True)
    codec = CodecConfig(code=mix.code, scales="joint_products")
    return CacheConfig(
        1,
        KV_HEADS,
        CHANNELS,
        codec,
        codec,
        rope_frequencies=FREQUENCIES,
        allocation=Allocation((keys,), (values,)),
    )


def calibration() -> calibrations.Calibration:
    """A basis for every head, which its groups need."""
    return calibrations.identity(1, KV_HEADS, CHANNELS)


def random_heads(key: jax.Array, mix: Mix, table: jax.Array, tokens: int):
    """Heads of a mix with random codes and scales near 1, in the pages of a table."""
    shapes = jax.eval_shape(
        lambda: create_cache(
            config_of(mix), 1, 1024, key=jax.random.key(0), num_pages=table.size,
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
    return PagedBlocks(pools, table, lengths, heads=rows.by_format())


def _random(key: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if leaf.dtype == jnp.uint8:
        return jax.random.bits(key, leaf.shape, jnp.uint8)
    scale = jax.random.uniform(key, (2, *leaf.shape), minval=0.5, maxval=1.5)
    words = jax.lax.bitcast_convert_type(scale.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
    return words[0] << 16 | words[1]
