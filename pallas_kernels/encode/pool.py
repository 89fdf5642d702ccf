"""Pages to be filled, how to fill them, and the check of their shapes."""

import dataclasses

import jax
from jaxtyping import Array, Float, UInt8, UInt32

from pallas_kernels.primitives.blocks import check_planes
from pallas_kernels.primitives.codebook import PLANE_WIDTHS
from pallas_kernels.primitives.limits import PAGE_TOKENS
from pallas_kernels.primitives.quantize import CodeOperand
from pallas_kernels.primitives.rotation import RotationOperand


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupOperand:
    """The channels of one group: planes as `BlocksOperand` has them, and how to fill them.

    The rotation is one for all heads and has no signs apart; its parts have the dtype of the
    vectors where that is bfloat16, else float32.
    """

    planes: tuple[UInt8[Array, "rows pages _ _"], ...]
    rotation: RotationOperand
    code: CodeOperand = dataclasses.field(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreRopeOperand:
    """A mean key that RoPE turns on from token to token, in pairs of channels.

    Pair c of the first `rotary` channels is (c, c + rotary / 2), the others are paired in the same
    way among themselves. Angles are [..., 2, H]: the cosine of each channel's pair, and its sine,
    negative for the first of the two.

    Attributes:
      angles: float16, of the 64 places in a period, whose numbers of 11 bits are taken as exact.
      opening: float32, of the tokens of a sequence's first block.
      turned: [jobs * periods of a block, K, 2, H], of each period of a job its mean as it is at
        the first place, and for each channel the other one of its pair.
    """

    angles: Float[Array, "64 2 H"]
    opening: Float[Array, "T 2 H"]
    turned: Float[Array, "periods K 2 H"]
    rotary: int = dataclasses.field(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
    """Where the blocks go: groups of keys and of values, and their scales.

    scales: the words of 16-bit scales, as `BlocksOperand` has them; or [K, jobs, T], of each head
    and job, for a caller that makes something else of them (`scales_by_job`).
    rotated_mean: what `rotated_means` makes of the key_mean, for callers that hold it; it is kept
    true as key_mean is.
    """

    keys: tuple[GroupOperand, ...]
    values: tuple[GroupOperand, ...]
    scales: tuple[UInt32[Array, "rows pages T"], ...]
    key_mean: Float[Array, "means K H"] | None
    pre_rope: PreRopeOperand | None = None
    rotated_mean: Float[Array, "means K H"] | None = None
    scales_by_job: bool = dataclasses.field(default=False, metadata=dict(static=True))

    @property
    def pages(self) -> tuple[int, int]:
        """Rows, and pages of each."""
        rows, pages = self.keys[0].planes[0].shape[:2]
        return rows, pages


def check(keys: jax.Array, values: jax.Array, jobs: jax.Array, pool: Pool) -> int:
    """Tokens of a page, after the shapes were seen to fit."""
    (rows, pages), tokens = pool.pages, pool.scales[0].shape[2]
    lead = (keys.shape[2], jobs.shape[0]) if pool.scales_by_job else (rows, pages)
    for scales in pool.scales:
        if scales.shape != (*lead, tokens):
            raise ValueError(f"scales: got {list(scales.shape)}, expected {[*lead, tokens]}")
    if tokens not in PAGE_TOKENS:
        raise NotImplementedError(f"pages: got {tokens} tokens, served are {PAGE_TOKENS}")
    if keys.shape != values.shape or keys.dtype != values.dtype:
        raise ValueError(
            f"keys and values: got {keys.dtype}{list(keys.shape)} and {values.dtype}"
            f"{list(values.shape)}, expected both [rows, slots, K, H]"
        )
    if keys.shape[1] < tokens or jobs.ndim != 2 or jobs.shape[1] != 6:
        raise ValueError(
            f"slots and jobs: got {keys.shape[1]} and {jobs.shape}, "
            f"expected at least {tokens} slots and jobs of 6 numbers"
        )
    for side, groups in (("keys", pool.keys), ("values", pool.values)):
        total = sum(group.rotation.parts.shape[2] for group in groups)
        if total != keys.shape[3]:
            raise ValueError(f"channels of {side}: got {keys.shape[3]}, expected {total}")
        for group in groups:
            dim = group.rotation.parts.shape[2]
            if dim % 8:
                raise ValueError(f"channels of a group: got {dim}, expected a multiple of 8")
            lines, length = (tokens, dim) if side == "keys" else (dim, tokens)
            widths = PLANE_WIDTHS[group.code.bits]
            check_planes(side, group.planes, widths, (rows, pages, lines), length)
    return tokens
