"""The packed layout of a block of T tokens of one layer and KV head.

    keys    uint8 [T, bytes]   packed along the channels: a token's row is contiguous
    values  uint8 [H, bytes]   packed along the tokens: a channel's row is contiguous
    scales  uint32 [T]         bfloat16 value scale << 16 | bfloat16 key scale

one uint8 array per plane of `packing`. Attention contracts keys over channels and values over
tokens; so packed, both contractions run along contiguous bytes, and codes can go from memory to
the operands of the tensor cores without a transposition. With T = 64 and H >= 64 every plane of a
block is a whole number of 128-byte lines. Groups of channels are arrays of their own; scale g of
the keys and scale g of the values share a word. Calibrated groups of a side have one scale.

Scales of 8 bits (`short_scales`) are

    scales  uint16 [T]       code of the value scale << 8 | code of the key scale
    bases   uint32           bfloat16 base of the values << 16 | bfloat16 base of the keys

A side in full precision is [T, H] in the cache's dtype, keys and values alike; its scales are none,
and those of the other side bfloat16 [T], or uint8 [T] and a bfloat16 base.

Keys of the code "prod" have beside them, of what their codes leave,

    signs   uint8 [T, H/8]   of its projections, one bit each (1 is +1), packed along them
    norms   bfloat16 [T]
"""

from dataclasses import dataclass
from itertools import zip_longest

import jax.numpy as jnp
from jax import lax
from jax.tree_util import register_dataclass
from jaxtyping import Array, BFloat16, Float, Shaped, UInt8, UInt16, UInt32

from turboquant_jax.cache import short_scales
from turboquant_jax.cache.codec import Codec, Group
from turboquant_jax.quantizers import packing


@register_dataclass
@dataclass(frozen=True)
class Sketches:
    """Of each key the signs of the projections of what its codes leave, and the norm of that."""

    signs: UInt8[Array, "*lead T _"]
    norms: BFloat16[Array, "*lead T"]


@register_dataclass
@dataclass(frozen=True)
class Blocks:
    """Packed blocks of any leading shape.

    `keys[g][p]` is uint8 [*lead, T, bytes], `values[g][p]` uint8 [*lead, H_g, bytes] and
    `scales[g]` uint32 [*lead, T], for group g of channels and plane p of its bits; `scales[0]` is
    that of all groups of a side that is calibrated. `sketches` are those of the keys, if any. The
    one plane of a side in full precision are its vectors, [*lead, T, H]. Scales of 8 bits have
    `bases` [*lead], one for each array of scales.
    """

    keys: tuple[tuple[Shaped[Array, "*lead T _"], ...], ...]
    values: tuple[tuple[Shaped[Array, "*lead _ _"], ...], ...]
    scales: tuple[Shaped[Array, "*lead T"], ...]
    sketches: Sketches | None = None
    bases: tuple[Shaped[Array, "*lead"], ...] = ()


def empty(
    codecs: tuple[Codec, Codec], lead: tuple[int, ...], tokens: int, scale_bits: int = 16
) -> Blocks:
    """Blocks of zeros; `lead` is (rows, pages) in a cache."""
    key, value = codecs

    def planes(count, group, rows):
        return tuple(
            jnp.zeros((*lead, rows, packing.plane_bytes(count, width)), jnp.uint8)
            for width in group.plane_widths
        )

    def vectors(codec):
        return ((jnp.zeros((*lead, tokens, codec.uncoded.dim), codec.uncoded.dtype),),)

    word, base = (jnp.uint32, None) if scale_bits == 16 else (jnp.uint16, jnp.uint32)
    if key.uncoded is not None or value.uncoded is not None:
        word, base = (jnp.bfloat16, None) if scale_bits == 16 else (jnp.uint8, jnp.bfloat16)
    words, sketches = max(key.scale_count, value.scale_count), None
    if key.sketch is not None:
        size = packing.plane_bytes(key.sketch.rows, 1)
        sketches = Sketches(
            jnp.zeros((*lead, tokens, size), jnp.uint8), jnp.zeros((*lead, tokens), jnp.bfloat16)
        )
    return Blocks(
        tuple(planes(group.dim, group, tokens) for group in key.groups) or vectors(key),
        tuple(planes(tokens, group, group.dim) for group in value.groups) or vectors(value),
        tuple(jnp.zeros((*lead, tokens), word) for _ in range(words)),
        sketches,
        () if base is None else tuple(jnp.zeros(lead, base) for _ in range(words)),
    )


def pack(
    codecs: tuple[Codec, Codec],
    keys: tuple[Group, ...],
    values: tuple[Group, ...],
    scale_bits: int = 16,
) -> Blocks:
    """Pack quantized groups, indices [*lead, T, K, channels] and scales [*lead, T, K].

    The blocks are [*lead, K, ...].
    """
    key_codec, value_codec = codecs
    sketches = None
    if key_codec.sketch is not None:
        *_, (signs, norms) = keys
        keys = keys[:-1]
        assert norms is not None
        sketches = Sketches(jnp.swapaxes(signs, -3, -2), jnp.swapaxes(norms, -2, -1))
    packed_keys = tuple(
        packing.pack(jnp.swapaxes(indices, -3, -2), group.plane_widths)
        for group, (indices, _) in zip(key_codec.groups, _coded(key_codec, keys), strict=True)
    )
    packed_values = tuple(
        packing.pack(jnp.moveaxis(indices, -3, -1), group.plane_widths)
        for group, (indices, _) in zip(value_codec.groups, _coded(value_codec, values), strict=True)
    )
    both = key_codec.uncoded is None and value_codec.uncoded is None
    pairs = [
        [None if scale is None else jnp.swapaxes(scale, -1, -2) for scale in pair]
        for pair in zip_longest(_scales(keys), _scales(values))
    ]
    bases: tuple = ()
    if scale_bits == 8:
        coded = [
            [None if scale is None else short_scales.encode_scales(scale) for scale in pair]
            for pair in pairs
        ]
        bases = tuple(_word([side and side[1] for side in pair], both) for pair in coded)
        pairs = [[side and side[0] for side in pair] for pair in coded]
    words = tuple(_word(pair, both) for pair in pairs)

    def vectors(groups):
        return ((jnp.swapaxes(groups[0][0], -3, -2),),)

    packed = packed_keys or vectors(keys), packed_values or vectors(values)
    return Blocks(*packed, words, sketches, bases)


def unpack(codecs: tuple[Codec, Codec], blocks: Blocks) -> tuple[tuple, tuple]:
    """Invert `pack`: groups of keys and of values, indices [*lead, T, channels]; packed signs."""
    key_codec, value_codec = codecs
    tokens = blocks.scales[0].shape[-1]
    keys = tuple(
        packing.unpack(planes, group.plane_widths, group.dim)
        for group, planes in zip(key_codec.groups, _coded(key_codec, blocks.keys), strict=True)
    )
    values = tuple(
        jnp.swapaxes(packing.unpack(planes, group.plane_widths, tokens), -1, -2)
        for group, planes in zip(
            value_codec.groups, _coded(value_codec, blocks.values), strict=True
        )
    )
    scales = scales_of(blocks)
    key_scales = [scale for scale, _ in scales[: key_codec.scale_count]]
    value_scales = [scale for _, scale in scales[: value_codec.scale_count]]
    of_keys = list(zip_longest(keys or blocks.keys[0], key_scales))
    if blocks.sketches is not None:
        of_keys.append((blocks.sketches.signs, blocks.sketches.norms))
    return tuple(of_keys), tuple(zip_longest(values or blocks.values[0], value_scales))


def _coded(codec: Codec, groups: tuple) -> tuple:
    """The groups of a side, none where it is in full precision."""
    return groups if codec.uncoded is None else ()


def largest_key(codec: Codec, blocks: Blocks) -> Float[Array, "*lead T"]:
    """What no channel of a token's key exceeds in the rotated space of its codec, float32;

    infinity where the key is not finite, or the scale of the value.
    """
    scale = jnp.zeros(blocks.scales[0].shape, jnp.float32)
    for key, value in scales_of(blocks):
        scale = jnp.maximum(scale, jnp.where(jnp.isfinite(value), _magnitude(key), jnp.inf))
    if codec.uncoded is not None:
        return jnp.maximum(jnp.where(jnp.isinf(scale), scale, 0.0), _reach(blocks.keys[0][0]))
    found = scale * max(abs(level) for group in codec.groups for level in group.levels)
    if codec.sketch is None or blocks.sketches is None:
        return found
    gain = codec.sketch.factor * jnp.max(jnp.sum(jnp.abs(codec.sketch.matrix), axis=0))
    return found + gain * _magnitude(blocks.sketches.norms)


def scales_of(blocks: Blocks) -> list[tuple[Float[Array, "*lead T"], Float[Array, "*lead T"]]]:
    """Of each array those of the key and of the value; where there is one, it is that of either."""
    if not blocks.bases:
        return [_halves(word) for word in blocks.scales]
    return [
        (
            short_scales.decode_scales(codes[0], base[0]),
            short_scales.decode_scales(codes[1], base[1]),
        )
        for codes, base in zip(map(_halves, blocks.scales), map(_halves, blocks.bases), strict=True)
    ]


def _halves(
    word: Shaped[Array, "*batch"],
) -> tuple[Shaped[Array, "*batch"], Shaped[Array, "*batch"]]:
    """What the key and the value have of it: bfloat16 numbers, or codes of 8 bits."""
    if word.dtype == jnp.uint32:
        return _as_bfloat16(word), _as_bfloat16(word >> jnp.uint32(16))
    if word.dtype == jnp.uint16:
        return word.astype(jnp.uint8), (word >> jnp.uint16(8)).astype(jnp.uint8)
    return word, word


def _reach(vectors: Float[Array, "*batch H"]) -> Float[Array, "*batch"]:
    return _magnitude(jnp.max(jnp.abs(vectors), axis=-1))


def _magnitude(scale: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """float32; infinity of what is not finite."""
    return jnp.where(jnp.isfinite(scale), jnp.abs(scale.astype(jnp.float32)), jnp.inf)


def _scales(groups: tuple[Group, ...]) -> list[Float[Array, "*vectors"]]:
    return [scale for _, scale in groups if scale is not None]


def shortened(
    words: UInt32[Array, "*lead T"],
) -> tuple[UInt16[Array, "*lead T"], UInt32[Array, "*lead"]]:
    """Words of scales of 16 bits as words of 8 bits, and of their bases."""
    key, value = map(short_scales.encode_scales, _halves(words))
    return _word([key[0], value[0]], both=True), _word([key[1], value[1]], both=True)


def _word(pair: list[Array | None], both: bool) -> Shaped[Array, "*batch"]:
    """The numbers of key and value in one word: one load. An absent group is zero.

    bfloat16 in uint32, codes of 8 bits in uint16; of one side alone the number itself.
    """
    if not both:
        (one,) = (x for x in pair if x is not None)
        return one if one.dtype == jnp.uint8 else one.astype(jnp.bfloat16)
    codes = any(x is not None and x.dtype == jnp.uint8 for x in pair)
    word, shift = (jnp.uint16, 8) if codes else (jnp.uint32, 16)

    def bits(x):
        if not codes:
            x = lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
        return x.astype(word)

    key, value = pair
    if key is None or value is None:
        return bits(key) if value is None else bits(value) << word(shift)
    return bits(value) << word(shift) | bits(key)


def _as_bfloat16(word: UInt32[Array, "..."]) -> Float[Array, "..."]:
    return lax.bitcast_convert_type(word.astype(jnp.uint16), jnp.bfloat16)
