"""What decode attention takes beside blocks, and the check of its shapes."""

import dataclasses

import jax
from jaxtyping import Array, Float, UInt8

from pallas_kernels.primitives.blocks import Blocks, check_pool

MAX_HEADS = 16


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
