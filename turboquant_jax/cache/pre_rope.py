"""The mean key before its rotary embedding, at any place, and what it is taken from.

A stored key is K_p = R_p k_p: RoPE turns pair c of its channels by the angle p w_c. Centring takes
R_p m from it, where m is the mean of rot(-p) K_p over a sequence's first block, and attention gives
<q, R_p m> back to its score. A constant factor of the embedding (yarn) is in m. What matters is
that both take the same number; how well it fits only says how much is left to be quantized.

So it is defined in factors that a kernel can use as they are. Token i behind the sinks, at position
p = sinks + i, has the period J = i // 64 and the place t = i % 64 in it, whatever a block is, and

    R_p m = e_t E_J m,    E_J = coarse[J // 64] fine[J % 64],

each factor a table of angles, made in float64: [rows, H], cosines of the pairs in the first half of
the columns, sines in the second. e_t is rounded to integers in units of 1 / 127, so that a kernel
multiplies bytes; E_J, of which 1 / 127 is a factor, in its tables to float16. What the rounding
turns wrongly, 3e-3 of |m|, stays in the key. A number of 11 bits times half of the 24 bits of
another is exact in float32: whether a compiler fuses products and sums or not, `turn` gives the
same bits.
"""

from dataclasses import dataclass, field

import jax.numpy as jnp
from jax import lax
from jax.tree_util import register_dataclass
from jaxtyping import Array, Float, Int

from pallas_kernels.primitives.period import PERIOD as PERIOD
from turboquant_jax.cache.angles import COARSE as COARSE
from turboquant_jax.cache.angles import FINE as FINE
from turboquant_jax.cache.angles import WITHIN_BITS as WITHIN_BITS
from turboquant_jax.cache.angles import angle_tables
from turboquant_jax.cache.config import CacheConfig
from turboquant_jax.quantizers.quantizer import ordered_sum


@register_dataclass
@dataclass(frozen=True)
class Phases:
    """The tables of angles of a cache; float32 ones hold numbers of float16.

    Attributes:
      coarse: of the first token of every `FINE` periods, the sinks before it counted.
      fine: of the first token of a period among those.
      within: float16, of a token in its period: integers up to `STEPS`, which `coarse`
        is divided by.
      rotary: channels that RoPE turns, the first ones: pair c of them is (c, c + rotary / 2); the
        others are paired in the same way among themselves and have angle 0.
    """

    coarse: Float[Array, "coarse H"]
    fine: Float[Array, "64 H"]
    within: Float[Array, "64 H"]
    rotary: int = field(metadata={"static": True})


def create(config: CacheConfig, capacity: int) -> Phases | None:
    """Tables for sequences of up to `capacity` tokens; None where the config has no use for them.

    Tokens beyond its end have the last coarse angle: exact all the same, but less is taken off.
    """
    if not config.centred or config.rope_frequencies is None:
        return None
    coarse, fine, within = angle_tables(config, capacity)
    return Phases(
        coarse=jnp.asarray(coarse),
        fine=jnp.asarray(fine),
        within=jnp.asarray(within),
        rotary=2 * len(config.rope_frequencies),
    )


def split_pairs(
    x: Float[Array, "*batch H"], rotary: int
) -> tuple[Float[Array, "*batch half"], Float[Array, "*batch half"]]:
    """First and second channels of all pairs."""
    edges = rotary // 2, rotary, (rotary + x.shape[-1]) // 2
    a, b, c, d = jnp.split(x, edges, axis=-1)
    return jnp.concatenate([a, c], axis=-1), jnp.concatenate([b, d], axis=-1)


def join_pairs(
    first: Float[Array, "*batch half"], second: Float[Array, "*batch half"], rotary: int
) -> Float[Array, "*batch H"]:
    """The channels of `split_pairs` in their order."""
    (a, c), (b, d) = (jnp.split(x, (rotary // 2,), axis=-1) for x in (first, second))
    return jnp.concatenate([a, b, c, d], axis=-1)


def turn(
    x: Float[Array, "*batch H"],
    angles: Float[Array, "*place H"],
    rotary: int,
    *,
    back: bool = False,
) -> Float[Array, "*batch H"]:
    """Turn the pairs of float32 vectors by rows of a table, or back by them."""
    cos, sin = jnp.split(angles.astype(jnp.float32), 2, axis=-1)
    sin = -sin if back else sin
    (a, a_rest), (b, b_rest) = (_halves(part) for part in split_pairs(x, rotary))
    first = (a * cos - b * sin) + (a_rest * cos - b_rest * sin)
    second = (b * cos + a * sin) + (b_rest * cos + a_rest * sin)
    return join_pairs(first, second, rotary)


def mean_key(keys: Float[Array, "T K H"], phases: Phases | None) -> Float[Array, "K H"]:
    """The mean of a sequence's first block, of those keys that are finite; float32, 0 if none is.

    One that is not would spoil all later ones. With phases, of the keys before RoPE.
    """
    keys = keys.astype(jnp.float32)
    finite = jnp.all(jnp.isfinite(keys), axis=-1, keepdims=True)
    count = jnp.sum(finite, axis=0, dtype=jnp.float32)
    if phases is not None:
        index = jnp.arange(keys.shape[0], dtype=jnp.int32)
        for angles in reversed(_angles(phases, index)):
            keys = turn(keys, angles[:, None], phases.rotary, back=True)
    total = ordered_sum(jnp.moveaxis(jnp.where(finite, keys, 0.0), 0, -1))
    return total / jnp.maximum(count, 1.0)


def mean_at(
    mean: Float[Array, "*batch K H"], phases: Phases | None, index: Int[Array, "*batch T"]
) -> Float[Array, "*batch T K H"]:
    """What is taken from the keys of tokens `index`, counted behind the sinks: R_p m, float32.

    Without phases it is the mean of the stored keys, at every place.
    """
    if phases is None:
        return jnp.broadcast_to(mean[..., None, :, :], (*index.shape, *mean.shape[-2:]))
    turned = mean_of_period(mean, phases, index // PERIOD)
    return turn(turned, phases.within[index % PERIOD][..., None, :], phases.rotary)


def swap_pairs(x: Float[Array, "*batch H"], rotary: int) -> Float[Array, "*batch H"]:
    """For each channel the other one of its pair."""
    first, second = split_pairs(x, rotary)
    return join_pairs(second, first, rotary)


def signed_angles(angles: Float[Array, "rows H"], rotary: int) -> Float[Array, "rows 2 H"]:
    """For each channel the cosine of its pair, and the sine, negative for the first of the two."""
    cos, sin = jnp.split(angles, 2, axis=-1)
    return jnp.stack([join_pairs(cos, cos, rotary), join_pairs(-sin, sin, rotary)], axis=1)


def angles_at(phases: Phases, index: Int[Array, " T"]) -> Float[Array, "T H"]:
    """The product of the three factors, rounded to float32."""
    coarse, fine, within = (
        lax.complex(*jnp.split(angles.astype(jnp.float32), 2, axis=-1))
        for angles in _angles(phases, index)
    )
    whole = coarse * fine * within
    return jnp.concatenate([whole.real, whole.imag], axis=-1)


def mean_of_period(
    mean: Float[Array, "*batch K H"], phases: Phases, period: Int[Array, "*batch T"]
) -> Float[Array, "*batch T K H"]:
    """E_J m, from which tokens of period J turn the mean by their place in it.

    Rounded to those of float32's bits whose products with `within` are exact.
    """
    coarse, fine, _ = _angles(phases, period * PERIOD)
    turned = jnp.broadcast_to(mean[..., None, :, :], (*period.shape, *mean.shape[-2:]))
    for angles in (coarse, fine):
        turned = turn(turned, angles[..., None, :], phases.rotary)
    bits = lax.bitcast_convert_type(turned, jnp.int32)
    half = jnp.int32(1 << (WITHIN_BITS - 1))
    return lax.bitcast_convert_type((bits + half) & jnp.int32(-(1 << WITHIN_BITS)), jnp.float32)


def center(
    keys: Float[Array, "T K H"],
    mean: Float[Array, "K H"],
    phases: Phases | None,
    index: Int[Array, " T"],
) -> Float[Array, "T K H"]:
    """Keys less their mean, as they are quantized, float32.

    With phases, keys of bfloat16 are rounded to it once more, so that tensor cores rotate what is
    meant.
    """
    if phases is None:
        return keys.astype(jnp.float32) - mean[None]
    turned = mean_of_period(mean, phases, index // PERIOD)
    cos, sin = jnp.split(phases.within[index % PERIOD][:, None].astype(jnp.float32), 2, axis=-1)
    a, b = split_pairs(turned, phases.rotary)
    first, second = split_pairs(keys.astype(jnp.float32), phases.rotary)
    centred = join_pairs(first - a * cos + b * sin, second - b * cos - a * sin, phases.rotary)
    return lax.reduce_precision(centred, 8, 7) if keys.dtype == jnp.bfloat16 else centred


def _angles(phases: Phases, index: Int[Array, "*batch T"]) -> tuple[Array, Array, Array]:
    """Rows [*batch, T, H] of the tables, coarse first."""
    period, place = index // PERIOD, index % PERIOD
    coarse = jnp.clip(period // FINE, 0, phases.coarse.shape[0] - 1)
    return phases.coarse[coarse], phases.fine[period % FINE], phases.within[place]


def _halves(x: Float[Array, "*batch half"]) -> tuple[Array, Array]:
    """The first 12 significant bits of float32 numbers, and the other 12."""
    bits = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(1 << 12))
    upper = lax.bitcast_convert_type(bits, jnp.float32)
    return upper, x - upper
