"""Scales in 8 bits: a base for the tokens of a page and head, and the logarithm of each below it.

    s = base * 2^(-(254 - c) / 32),    c = 1 to 254;    c = 0: s = 0,    c = 255: NaN

The base is the largest scale, a bfloat16, and a step is a 32nd of an octave: rounding is at most
1.1 % of a scale. The smallest that is not 0 is 0.0042 of the base; half of it and less is 0, as is
what is negative or below the normal numbers. Codes are found in integers, from the bits of
bfloat16 scales and a table of logarithms, so that no compiler rounds a tie in its own way.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, BFloat16, Float, UInt8

STEPS = 32
"""Codes of an octave."""
LARGEST, NOT_FINITE = 254, 255
_UNIT = 10  # bits behind the point of a logarithm
# log2 of 1 + m / 128, the significand of a bfloat16, in steps
_LOGARITHM = np.round(STEPS * 2**_UNIT * np.log2(1 + np.arange(128) / 128)).astype(np.int32)


def encode_scales(
    scales: BFloat16[Array, "*lead T"],
) -> tuple[UInt8[Array, "*lead T"], BFloat16[Array, "*lead"]]:
    """Codes of the scales of T tokens, and their base."""
    bits = lax.bitcast_convert_type(scales.astype(jnp.bfloat16), jnp.uint16).astype(jnp.int32)
    magnitude = bits & 0x7FFF
    finite = magnitude < 0x7F80
    usable = finite & (bits >= 0x80) & (bits < 0x8000)
    top = jnp.max(jnp.where(usable, bits, 0), axis=-1)
    below = _position(top)[..., None] - _position(bits)
    code = LARGEST - ((below + (1 << (_UNIT - 1))) >> _UNIT)
    code = jnp.where(code > 1 - STEPS, jnp.maximum(code, 1), 0)
    code = jnp.where(usable, code, jnp.where(finite, 0, NOT_FINITE))
    base = lax.bitcast_convert_type(top.astype(jnp.uint16), jnp.bfloat16)
    return code.astype(jnp.uint8), base


def decode_scales(
    codes: UInt8[Array, "*lead T"], base: BFloat16[Array, "*lead"]
) -> Float[Array, "*lead T"]:
    """The scales, float32."""
    code = codes.astype(jnp.float32)
    found = base.astype(jnp.float32)[..., None] * jnp.exp2((code - LARGEST) / STEPS)
    found = jnp.where(codes == 0, 0.0, found)
    return jnp.where(codes == NOT_FINITE, jnp.nan, found)


def through(scales: BFloat16[Array, "B T K"], sinks: int, block: int) -> Float[Array, "B T K"]:
    """Scales as they come back, block by block; those of the sinks stay: they are never seen."""
    count = scales.shape[1]
    tail = -(count - sinks) % block
    behind = jnp.pad(scales, ((0, 0), (0, tail), (0, 0)))[:, sinks:]
    split = behind.reshape(behind.shape[0], -1, block, behind.shape[2])
    codes = encode_scales(jnp.moveaxis(split, 2, 3))
    found = jnp.moveaxis(decode_scales(*codes), 3, 2).reshape(behind.shape)
    return jnp.pad(found, ((0, 0), (sinks, 0), (0, 0)))[:, :count]


def _position(bits: Array) -> Array:
    """The logarithm of positive bfloat16 numbers by their bits, int32."""
    return ((bits >> 7) * (STEPS << _UNIT)) + jnp.asarray(_LOGARITHM)[bits & 127]
