"""Pages of compressed keys and values as the kernels read them, and the check of their shapes."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, UInt8, UInt32

from pallas_kernels.primitives.codebook import CodebookOperand

PAGE_TOKENS = (32, 64, 128)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlocksOperand:
    """Pages of T compressed tokens for one group of H channels (all of them, or a mixed-bit group).

    A row is a kv head of a layer, and has its pages together. keys: planes uint8 [rows, pages, T,
    H*w/8], packed along the channels; values: planes uint8 [rows, pages, H, T*w/8], packed along
    the tokens of the page; scales: uint32 [rows, pages, T], the bf16 scale of the value << 16 |
    that of the key. A value is scale * step * level[code].
    """

    keys: tuple[UInt8[Array, "rows pages T _"], ...]
    values: tuple[UInt8[Array, "rows pages H _"], ...]
    scales: UInt32[Array, "rows pages T"]
    key_codebook: CodebookOperand = dataclasses.field(metadata=dict(static=True))
    value_codebook: CodebookOperand = dataclasses.field(metadata=dict(static=True))


def flat(x: jax.Array) -> jax.Array:
    """The pages of all rows one after another: page p of row r is r * pages + p."""
    return x.reshape(-1, *x.shape[2:])


def key_scale(word: jax.Array) -> jax.Array:
    """The key's scale: the low half of the token's word, or a scale of its own (the sketch)."""
    if word.dtype == jnp.uint32:
        return lax.bitcast_convert_type(word << 16, jnp.float32)
    return word.astype(jnp.float32)


def value_scale(word: jax.Array) -> jax.Array:
    """The value's scale, the high half of the token's word."""
    return lax.bitcast_convert_type(word & jnp.uint32(0xFFFF0000), jnp.float32)


def check_pool(groups: tuple[BlocksOperand, ...]) -> tuple[int, int, int]:
    """(rows, pages of a row, tokens of a page), after the groups were seen to belong together."""
    if not groups:
        raise ValueError("groups: got none, expected at least one")
    rows, pages, tokens = groups[0].scales.shape
    if tokens not in PAGE_TOKENS:
        raise NotImplementedError(f"pages: got {tokens} tokens, served are 32, 64 and 128")
    for group in groups:
        count = group.values[0].shape[2] if group.values else 0
        check_planes("keys", group.keys, group.key_codebook.widths, (rows, pages, tokens), count)
        check_planes(
            "values", group.values, group.value_codebook.widths, (rows, pages, count), tokens
        )
        if group.scales.shape != (rows, pages, tokens) or group.scales.dtype != jnp.uint32:
            raise ValueError(
                f"scales: got {group.scales.dtype}{list(group.scales.shape)}, "
                f"expected uint32{[rows, pages, tokens]}"
            )
    return rows, pages, tokens


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
