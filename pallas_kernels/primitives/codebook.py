"""The static facts of a code: bits, integer levels, step, and the planes that hold its codes.

Codes of b bits along an axis of N elements lie in planes of power-of-two widths, widest first (7
bits: 4, 2, 1), the low bits of a code in the first plane. A plane of width w has N*w/8 bytes;
element i is in byte i mod (N*w/8) at bit w * (i // (N*w/8)). A trellis code has its path bit, the
highest one, in a last plane of its own.
"""

import dataclasses
import math
from typing import Literal

CodeKind = Literal["scalar", "trellis"]

PLANE_WIDTHS = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (8,),
}


def level_limits(bits: int, code: CodeKind = "scalar") -> tuple[int, int]:
    """Smallest and largest level that the kernel can hold at this code width.

    A byte look-up answers up to 8 levels: any signed byte. Of 16 levels two half tables have 8
    each: at 4 scalar bits they are merged by the sign bit of their bytes, which leaves 7 bits;
    those of a 3-bit trellis are told apart by it, and are added up, which takes one off. All others
    are two digits in base 128.
    """
    levels = 2 ** (bits + (code == "trellis"))
    if levels <= 8:
        return -128, 127
    if levels == 16:
        return (-64, 63) if code == "scalar" else (-128, 126)
    return -8192, 8191


@dataclasses.dataclass(frozen=True)
class CodebookOperand:
    """value = scale * step * levels[number], with one scale per token.

    `bits` of 1 to 8, of a trellis 1 to 4; `levels`: 2**bits integers, twice as many of a trellis,
    within `level_limits(bits, code)`, number 0 first, in any order; but of a 3-bit trellis the
    first half is negative and the second is not. `step`: the real width of one level unit.
    Raises ValueError.
    """

    bits: int
    levels: tuple[int, ...]
    step: float
    code: CodeKind = "scalar"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= (4 if self.code == "trellis" else 8):
            raise ValueError(f"bits: got {self.bits}, expected 1 to 8, or 1 to 4 of a trellis")
        count = 2 ** (self.bits + (self.code == "trellis"))
        if len(self.levels) != count:
            raise ValueError(
                f"levels: got {len(self.levels)} for {self.bits} {self.code} bits, expected {count}"
            )
        low, high = level_limits(self.bits, self.code)
        for i, level in enumerate(self.levels):
            if not isinstance(level, int) or not low <= level <= high:
                raise ValueError(f"level: got {level!r}, expected integers in [{low}, {high}]")
            if self.code == "trellis" and self.bits == 3 and (level < 0) != (i < 8):
                raise ValueError(
                    f"level: got {level} as number {i} of a 3-bit trellis, expected "
                    f"{'a negative one' if i < 8 else 'none below 0'}"
                )

    @property
    def most(self) -> int:
        """How many times its integers the levels may be."""
        low, high = level_limits(self.bits, self.code)
        return min((high // x if x > 0 else low // x for x in self.levels if x), default=1)

    def refined(self, step: float) -> "CodebookOperand":
        """The same values in steps of at most this size, or as fine as the limits allow."""
        times = min(self.most, max(1, math.ceil(self.step / step - 1e-6)))
        levels = tuple(times * level for level in self.levels)
        return dataclasses.replace(self, levels=levels, step=self.step / times)

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the planes in bits, low bits of the code first."""
        if self.code == "scalar":
            return PLANE_WIDTHS[self.bits]
        return (PLANE_WIDTHS[self.bits - 1] if self.bits > 1 else ()) + (1,)
