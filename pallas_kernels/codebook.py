"""The static facts of a code: bits, integer levels, step, and the planes that hold its codes.

Codes of b bits along an axis of N elements lie in planes of power-of-two widths, widest first (7
bits: 4, 2, 1), the low bits of a code in the first plane. A plane of width w has N*w/8 bytes;
element i is in byte i mod (N*w/8) at bit w * (i // (N*w/8)).
"""

import dataclasses

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


def level_limits(bits: int) -> tuple[int, int]:
    """Smallest and largest level that the kernel can hold at this code width.

    A byte look-up answers up to 4 bits. At 3 bits and fewer a level is any signed byte. At 4 bits
    two half tables are merged by the sign bit of their bytes, which leaves 7 bits. From 5 bits on
    a level is two digits in base 128.
    """
    if bits <= 3:
        return -128, 127
    return (-64, 63) if bits == 4 else (-8192, 8191)


@dataclasses.dataclass(frozen=True)
class Codebook:
    """value = scale * step * levels[code], with one scale per token.

    `bits` of 1 to 8; `levels`: 2**bits integers within `level_limits(bits)`, code 0 first, in any
    order; `step`: the real width of one level unit. Raises ValueError.
    """

    bits: int
    levels: tuple[int, ...]
    step: float

    def __post_init__(self) -> None:
        if self.bits not in PLANE_WIDTHS:
            raise ValueError(f"got bits={self.bits}, expected 1 to 8")
        if len(self.levels) != 2**self.bits:
            raise ValueError(
                f"got {len(self.levels)} levels for {self.bits} bits, expected {2**self.bits}"
            )
        low, high = level_limits(self.bits)
        for level in self.levels:
            if not isinstance(level, int) or not low <= level <= high:
                raise ValueError(
                    f"got level {level!r} at {self.bits} bits, expected integers in [{low}, {high}]"
                )

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the planes in bits, low bits of the code first."""
        return PLANE_WIDTHS[self.bits]
