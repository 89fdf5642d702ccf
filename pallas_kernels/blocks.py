"""Pages of compressed keys and values as the kernel reads them, and the check of their shapes."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8, UInt32

from pallas_kernels.codebook import Codebook

PAGE_TOKENS = (32, 64, 128)
MAX_HEADS = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """Pages of T compressed tokens for one group of H channels (all of them, or a mixed-bit group).

    keys: planes uint8 [pages, K, T, H*w/8], packed along the channels; values: planes uint8
    [pages, K, H, T*w/8], packed along the tokens of the page; scales: uint32 [pages, K, T], the
    bf16 scale of the value << 16 | that of the key. A value is scale * step * level[code].
    """

    keys: tuple[UInt8[Array, "pages K T _"], ...]
    values: tuple[UInt8[Array, "pages K H _"], ...]
    scales: UInt32[Array, "pages K T"]
    key_codebook: Codebook = dataclasses.field(metadata=dict(static=True))
    value_codebook: Codebook = dataclasses.field(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sketch:
    """Correction of the scores by signs of projected residuals: + norm * sum(sign * query).

    query [B, N, M], projected and scaled by the caller; signs: the plane uint8 [pages, K, T, M/8]
    of a 1-bit code (1 is +1, 0 is -1) packed along the projections; norms [pages, K, T].
    """

    query: Float[Array, "B N M"]
    signs: UInt8[Array, "pages K T _"]
    norms: Float[Array, "pages K T"]


def check(
    q: jax.Array, groups: tuple[Blocks, ...], page_table: jax.Array, lengths: jax.Array
) -> tuple[int, int]:
    """(kv heads, tokens of a page), after the shapes were seen to fit."""
    _, kv_heads, tokens = check_pool(groups)
    batch, heads, channels = q.shape
    if heads % kv_heads:
        raise ValueError(f"got {heads} query heads, expected a multiple of {kv_heads} kv heads")
    if heads // kv_heads > MAX_HEADS:
        raise NotImplementedError(
            f"{heads // kv_heads} query heads per kv head: served are up to {MAX_HEADS}"
        )
    if page_table.shape[0] != batch or lengths.shape != (batch,):
        raise ValueError(
            f"got page_table {page_table.shape} and lengths {lengths.shape}, expected {batch} rows"
        )
    total = sum(group.values[0].shape[2] for group in groups)
    if total != channels:
        raise ValueError(f"got queries of {channels} channels, expected the groups' {total}")
    return kv_heads, tokens


def check_pool(groups: tuple[Blocks, ...]) -> tuple[int, int, int]:
    """(pages, kv heads, tokens of a page), after the groups were seen to belong together."""
    if not groups:
        raise ValueError("got no groups of blocks, expected at least one")
    pages, kv_heads, tokens = groups[0].scales.shape
    if tokens not in PAGE_TOKENS:
        raise NotImplementedError(f"pages of {tokens} tokens: served are 32, 64 and 128")
    for group in groups:
        count = group.values[0].shape[2] if group.values else 0
        check_planes(
            "keys", group.keys, group.key_codebook.widths, (pages, kv_heads, tokens), count
        )
        check_planes(
            "values", group.values, group.value_codebook.widths, (pages, kv_heads, count), tokens
        )
        if group.scales.shape != (pages, kv_heads, tokens) or group.scales.dtype != jnp.uint32:
            raise ValueError(
                f"got scales {group.scales.dtype}{list(group.scales.shape)}, "
                f"expected uint32{[pages, kv_heads, tokens]}"
            )
    return pages, kv_heads, tokens


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
        raise ValueError(f"got {name} planes {got} for {length} elements, expected {expected}")
    for plane in planes:
        if plane.dtype != jnp.uint8:
            raise ValueError(f"got {name} of {plane.dtype}, expected uint8")
