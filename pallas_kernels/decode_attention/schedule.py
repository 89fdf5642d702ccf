"""How the work of a call is cut into programs."""

import dataclasses
from typing import Literal

from pallas_kernels.primitives.dequantize import power_of_two

# Programs in one wave on an H100 (132 multiprocessors, 7 or 8 on each): fewer leave it idle, more
# programs run slower by 3 to 15 % (docs/kernels.md).
PROGRAMS = 1024
# Half as many where the codes of a tile are little work for its bytes, each with more on its way:
# multiprocessors read at unlike speeds, so that some are done when others have a sixth to go, and
# these can then still keep the memory busy.
FEW_PROGRAMS = 512
Work = Literal["usual", "little", "little and turning"]
"""Little is that of 4 scalar bits; a mean that turns is more, and wants two warps."""
# The same with more query heads of a kv head than this, two of whose programs fill the registers.
WIDE, WIDE_PROGRAMS = 8, 256
# Bits of a token's keys, or values, of which a tile of twice the tokens still fits beside another.
WIDE_BITS = 128 * 8
# A split of fewer tiles than this spends its time on starting and on being merged.
MIN_TILES = 4
# Tokens of a tile: as many pages as it takes.
TILE_TOKENS = 64
# Tiles in whose time the tokens in full precision are begun, and the blocks after them.
EXACT_START = 4


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Splits of a sequence; pages of a tile (at least 64 tokens); warps and stages of a program.

    `exact_tiles`: as many tiles fewer has the split that attends to tokens in full precision too.
    `dealt`: whether splits go to sequences by their lengths, where that can be (`deal.dealt`).
    """

    splits: int
    pages: int
    warps: int
    stages: int
    exact_tiles: int = 0
    dealt: bool = True


def default_schedule(
    *,
    sequences: int,
    heads: int,
    channels: int,
    bits: int,
    tokens: int,
    max_pages: int,
    exact: int = 0,
    work: Work = "usual",
    formats: int = 1,
) -> Schedule:
    """The measured best of these shapes, and of nothing else: results repeat bit by bit.

    `sequences`: times kv heads; `heads`: query heads of one kv head; `channels`: of the widest
    group; `bits`: of the widest code; `exact`: tokens of the blocks that have the bytes of those in
    full precision beside them; `work`: of a tile; `formats`: of the heads, which run one after the
    other and fill the device each.
    One warp needs no barrier, and suffices where its sums fit in the registers. Many heads fill
    those of four warps, which want as many rows of a tile: twice the tokens.
    """
    wide = heads > WIDE
    # Codes of more than 4 bits are gathered into words. Those of padded channels are masked and
    # pass through shared memory, where those of twice the tokens have no room.
    masked = bits > 4 and power_of_two(channels) > channels
    size = TILE_TOKENS * (2 if wide and channels * bits <= WIDE_BITS and not masked else 1)
    pages = max(1, size // tokens)
    small = heads <= 4 and channels <= 128 and pages * tokens == TILE_TOKENS and bits <= 4
    tiles = -(-max_pages // pages)
    few = work != "usual" and not wide and pages * tokens == TILE_TOKENS
    programs = WIDE_PROGRAMS if wide else FEW_PROGRAMS if few else PROGRAMS
    splits = min(programs * formats // sequences, tiles // MIN_TILES)
    return Schedule(
        splits=max(1, splits),
        pages=pages,
        warps=4 if wide else 1 if small and not (few and "turning" in work) else 2,
        stages=4 if few else 3,
        exact_tiles=exact // size + EXACT_START if exact else 0,
    )
