"""Pages of compressed keys and values as the kernels read them, and the check of their shapes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

from pallas_kernels.primitives import triton
from pallas_kernels.primitives.codebook import CodebookOperand
from pallas_kernels.primitives.limits import PAGE_TOKENS

Refs = dict[str, Any]
Planes = tuple[Shaped[Array, "rows pages _ _"], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlocksOperand:
    """Pages of T compressed tokens of H channels, in groups of different bits or in one.

    A row is a kv head of a layer, and has its pages together. Of group g, keys[g]: planes uint8
    [rows, pages, T, H_g*w/8], packed along its channels; values[g]: planes uint8 [rows, pages, H_g,
    T*w/8], packed along the tokens of the page. The groups of keys need not be those of values.
    scales[g]: uint32 [rows, pages, T], the bf16 scale of the value << 16 | that of the key, of
    group g; or `scales[0]` has that of all groups of the sides in `joint`, (keys, values). A value
    is scale * step * level[code].

    With `bases` [rows, pages] scales are codes of 8 bits (`ShortScales`): scales[g] uint16, the
    code of the value << 8 | that of the key, bases[g] uint32, two bf16 numbers in the same order.

    A side without codebooks is in full precision: one group of one plane, the vectors [rows, pages,
    T, H] in 16 bits. The scales are those of the other side then: bf16, or uint8 and bf16 bases.
    """

    keys: tuple[Planes, ...]
    values: tuple[Planes, ...]
    scales: tuple[Shaped[Array, "rows pages T"], ...]
    key_codebooks: tuple[CodebookOperand, ...] = dataclasses.field(metadata=dict(static=True))
    value_codebooks: tuple[CodebookOperand, ...] = dataclasses.field(metadata=dict(static=True))
    joint: tuple[bool, bool] = dataclasses.field(default=(False, False), metadata=dict(static=True))
    bases: tuple[Shaped[Array, "rows pages"], ...] = ()

    @property
    def key_channels(self) -> tuple[int, ...]:
        """Of each group of keys."""
        if not self.key_codebooks:
            return (self.keys[0][0].shape[3],)
        books = zip(self.keys, self.key_codebooks, strict=True)
        return tuple(planes[0].shape[3] * 8 // book.widths[0] for planes, book in books)

    @property
    def value_channels(self) -> tuple[int, ...]:
        """Of each group of values."""
        if not self.value_codebooks:
            return (self.values[0][0].shape[3],)
        return tuple(planes[0].shape[2] for planes in self.values)

    @property
    def key_words(self) -> tuple[int, ...]:
        """In which of the scales is that of each group of keys."""
        return tuple(0 if self.joint[0] else g for g in range(len(self.key_codebooks)))

    @property
    def value_words(self) -> tuple[int, ...]:
        """In which of the scales is that of each group of values."""
        return tuple(0 if self.joint[1] else g for g in range(len(self.value_codebooks)))


def flat(x: jax.Array) -> jax.Array:
    """The pages of all rows one after another: page p of row r is r * pages + p."""
    return x.reshape(-1, *x.shape[2:])


@dataclasses.dataclass(frozen=True)
class ShortScales:
    """Scales that were codes of 8 bits, float32: base * 2^((c - 254) / 32), 0 and NaN apart."""

    key: jax.Array
    value: jax.Array


Word = jax.Array | ShortScales
"""The scales of tokens: two in a word, one that stands alone, or both by themselves."""


def load_scales(refs: Refs, number: int, place: tuple, mask: jax.Array | None = None) -> Word:
    """Those of number `number` of tokens in (page, token) `place`; 0 where masked.

    refs: "scales", and "bases" where there are any.
    """
    ref = refs["scales"][number]
    at = ref.at[place]
    if mask is None:
        word = triton.load(at)
    else:
        word = triton.load(at, mask=mask, other=jnp.zeros((), ref.dtype))
    if number >= len(refs["bases"]):
        return word
    base = triton.load(refs["bases"][number].at[place[:-1]])
    code = word.astype(jnp.int32)
    if ref.dtype == jnp.uint8:
        scale = _short_scale(code, base.astype(jnp.float32))
        return ShortScales(scale, scale)
    return ShortScales(
        _short_scale(code & 255, key_scale(base)), _short_scale(code >> 8, value_scale(base))
    )


def _short_scale(code: jax.Array, base: jax.Array) -> jax.Array:
    power = triton.exp2((code - 254).astype(jnp.float32) * (1 / 32))
    found = jnp.where(code == 0, 0.0, base * power)
    return jnp.where(code == 255, jnp.nan, found)


def key_scale(word: Word) -> jax.Array:
    """The key's scale: the low half of the token's word, or a scale that stands alone."""
    if isinstance(word, ShortScales):
        return word.key
    if word.dtype == jnp.uint32:
        return lax.bitcast_convert_type(word << 16, jnp.float32)
    return word.astype(jnp.float32)


def value_scale(word: Word) -> jax.Array:
    """The value's scale: the high half of the token's word, or a scale that stands alone."""
    if isinstance(word, ShortScales):
        return word.value
    if word.dtype != jnp.uint32:
        return word.astype(jnp.float32)
    return lax.bitcast_convert_type(word & jnp.uint32(0xFFFF0000), jnp.float32)


def check_pool(blocks: BlocksOperand) -> tuple[int, int, int]:
    """(rows, pages of a row, tokens of a page), after the groups were seen to belong together."""
    if not (blocks.keys and blocks.values and all((*blocks.keys, *blocks.values))):
        raise ValueError("groups: got none, or one without planes, expected at least one")
    if not (blocks.key_codebooks or blocks.value_codebooks):
        raise NotImplementedError("codebooks: got none, served are one or two coded sides")
    words = max((*blocks.key_words, *blocks.value_words)) + 1
    if len(blocks.scales) != words:
        raise ValueError(f"scales: got {len(blocks.scales)} words a token, expected {words}")
    rows, pages, tokens = blocks.scales[0].shape
    if tokens not in PAGE_TOKENS:
        raise NotImplementedError(f"pages: got {tokens} tokens, served are 32, 64 and 128")
    place = rows, pages
    coded = bool(blocks.key_codebooks), bool(blocks.value_codebooks)
    for side, is_coded in zip((blocks.keys, blocks.values), coded, strict=True):
        if not is_coded:
            _check_vectors(side, (*place, tokens))
    for planes, book, count in zip(
        blocks.keys if coded[0] else (), blocks.key_codebooks, blocks.key_channels, strict=coded[0]
    ):
        check_planes("keys", planes, book.widths, (*place, tokens), count)
    for planes, book, count in zip(
        blocks.values if coded[1] else (),
        blocks.value_codebooks,
        blocks.value_channels,
        strict=coded[1],
    ):
        check_planes("values", planes, book.widths, (*place, count), tokens)
    if sum(blocks.key_channels) != sum(blocks.value_channels):
        raise ValueError(
            f"channels: got {blocks.key_channels} of keys and {blocks.value_channels} of values, "
            "expected as many"
        )
    _check_scales(blocks, all(coded), (*place, tokens))
    return rows, pages, tokens


def _check_scales(blocks: BlocksOperand, both: bool, shape: tuple[int, ...]) -> None:
    """Raises where scales, or bases, are not those of these tokens, of `both` sides or one."""
    types = (jnp.uint32, None) if both else (jnp.bfloat16, None)
    if blocks.bases:
        types = (jnp.uint16, jnp.uint32) if both else (jnp.uint8, jnp.bfloat16)
        if len(blocks.bases) != len(blocks.scales):
            raise ValueError(f"bases: got {len(blocks.bases)} of {len(blocks.scales)} scales")
    arrays = [(x, types[0], shape) for x in blocks.scales]
    for x, dtype, expected in arrays + [(x, types[1], shape[:-1]) for x in blocks.bases]:
        if x.shape != expected or x.dtype != dtype:
            raise ValueError(
                f"scales: got {x.dtype}{list(x.shape)}, expected {jnp.dtype(dtype)}{list(expected)}"
            )


def _check_vectors(side: tuple[Planes, ...], place: tuple[int, ...]) -> None:
    """Raises where a side without codebooks are not the vectors of these tokens."""
    shapes = [plane.shape for planes in side for plane in planes]
    if len(shapes) != 1 or shapes[0][:3] != place:
        raise ValueError(f"vectors: got {shapes}, expected one array of {list(place)} vectors")
    if side[0][0].dtype.itemsize != 2:
        raise NotImplementedError(f"vectors: got {side[0][0].dtype}, served are types of 16 bits")


def check_planes(
    name: str,
    planes: tuple[jax.Array, ...],
    widths: tuple[int, ...],
    rows: tuple[int, ...],
    length: int,
) -> None:
    """Raises where planes do not hold codes of `length` elements in `rows`."""
    expected = [(*rows, length * width // 8) for width in widths]
    got = [plane.shape for plane in planes]
    if got != expected or length % 8:
        raise ValueError(f"planes of {name}: got {got} for {length} elements, expected {expected}")
    for plane in planes:
        if plane.dtype != jnp.uint8:
            raise ValueError(f"planes of {name}: got {plane.dtype}, expected uint8")
