"""What decode attention takes, and the check of its shapes."""

import dataclasses

import jax
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.primitives.blocks import BlocksOperand, check_pool
from pallas_kernels.primitives.limits import MAX_FORMATS, MAX_HEADS
from pallas_kernels.primitives.rotation import RotationOperand


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedBlocks:
    """The compressed tokens of some sequences, in the pages of a pool.

    Sequence b has `lengths[b]` tokens; its block j
    lies in the page that `page_table[b]` has in slot j modulo its slots. Slots of unseen blocks are
    never used. Of one pool the kv heads are the rows from `row` on, so many as there are, or all
    rows. Heads of several formats are in pools of their own: `heads` has the number of the pool,
    the row there and the head, those of one pool side by side.
    """

    pools: tuple[BlocksOperand, ...]
    page_table: Int[Array, "B max_pages"]
    lengths: Int[Array, " B"]
    row: Int[Array, ""] | None = None
    kv_heads: int | None = dataclasses.field(default=None, metadata=dict(static=True))
    heads: Int[Array, "K 3"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Softmax:
    """score = scale * q.k, then soft_cap * tanh(score / soft_cap) if there is a cap.

    `sink_logits`, of each query head, add exp(sink) to the denominator.
    """

    scale: float = dataclasses.field(metadata=dict(static=True))
    soft_cap: float | None = dataclasses.field(default=None, metadata=dict(static=True))
    sink_logits: Float[Array, " N"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sketch:
    """Correction of the scores by signs of projected residuals: + norm * sum(sign * query).

    query [B, N, M], projected and scaled by the caller; signs: the plane uint8 [rows, pages, T,
    M/8] of a 1-bit code (1 is +1, 0 is -1) packed along the projections; norms [rows, pages, T].
    """

    query: Float[Array, "B N M"]
    signs: UInt8[Array, "rows pages T _"]
    norms: Float[Array, "rows pages T"]


def check(q: jax.Array, blocks: PagedBlocks) -> int:
    """The number of kv heads, after the shapes were seen to fit."""
    kv_heads = _check_pools(blocks)
    batch, heads, channels = q.shape
    if heads % kv_heads:
        raise ValueError(f"query heads: got {heads}, expected a multiple of {kv_heads} kv heads")
    if heads // kv_heads > MAX_HEADS:
        raise NotImplementedError(
            f"query heads: got {heads // kv_heads} a kv head, served are up to {MAX_HEADS}"
        )
    if blocks.page_table.shape[0] != batch or blocks.lengths.shape != (batch,):
        raise ValueError(
            f"page_table and lengths: got {blocks.page_table.shape} and {blocks.lengths.shape}, "
            f"expected {batch} rows"
        )
    for pool in blocks.pools:
        if sum(pool.value_channels) != channels:
            raise ValueError(
                f"queries: got {channels} channels, expected the groups' {sum(pool.value_channels)}"
            )
    return kv_heads


def _check_pools(blocks: PagedBlocks) -> int:
    if not 1 <= len(blocks.pools) <= MAX_FORMATS:
        raise NotImplementedError(
            f"formats: got heads of {len(blocks.pools)}, served are 1 to {MAX_FORMATS} in a call"
        )
    tokens = {check_pool(pool)[2] for pool in blocks.pools}
    if len(tokens) > 1:
        raise ValueError(f"pools: got pages of {sorted(tokens)} tokens, expected all alike")
    if (blocks.heads is None) != (len(blocks.pools) == 1):
        raise ValueError(
            f"heads: got {'none' if blocks.heads is None else 'some'} of {len(blocks.pools)} "
            "pools, expected them of several, and of one none"
        )
    if blocks.heads is not None:
        if blocks.heads.ndim != 2 or blocks.heads.shape[1] != 3:
            raise ValueError(f"heads: got {blocks.heads.shape}, expected [kv heads, 3]")
        return blocks.heads.shape[0]
    rows = blocks.pools[0].scales[0].shape[0]
    kv_heads = rows if blocks.kv_heads is None else blocks.kv_heads
    if not 1 <= kv_heads <= rows:
        raise ValueError(f"kv_heads: got {kv_heads}, expected 1 to the {rows} rows")
    return kv_heads


def check_rotation(rotation: RotationOperand, kv_heads: int, channels: int) -> None:
    """Raises unless it is one of these channels, for all heads or for each."""
    if rotation.parts.shape[1:] not in [(n, channels, channels) for n in (1, kv_heads)]:
        raise ValueError(
            f"parts of a rotation: got {rotation.parts.shape}, expected "
            f"[parts, 1 or {kv_heads}, {channels}, {channels}]"
        )
