"""Bits of each layer: how many its keys and its values get, and which choice loses least."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Allocation:
    """Bits per channel of the keys, and of the values, of every layer.

    Raises:
      ValueError: keys and values of different numbers of layers, or bits that are no integers
        from 1 to 8.
    """

    keys: tuple[int, ...]
    values: tuple[int, ...]

    def __post_init__(self):
        if not self.keys or len(self.keys) != len(self.values):
            raise ValueError(
                "keys and values must have bits for the same layers, "
                f"got {len(self.keys)} and {len(self.values)}"
            )
        for name in ("keys", "values"):
            for layer, bits in enumerate(getattr(self, name)):
                if type(bits) is not int or not 1 <= bits <= 8:
                    raise ValueError(
                        f"bits must be integers between 1 and 8, got {bits!r} "
                        f"for the {name} of layer {layer}"
                    )

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """(bits of the keys, bits of the values) of every layer."""
        return tuple(zip(self.keys, self.values, strict=True))


def allocate(losses: Sequence[Mapping[int, float]], budget: int) -> tuple[tuple[int, ...], float]:
    """Bits of every part whose losses add up to the least, with at most `budget` bits in all.

    Exact, by dynamic programming over the bits spent. A part is whatever has bits of its own: the
    keys of a layer, its values, one head of them.

    Args:
      losses: loss by bits, for each part.
      budget: bits that all parts together may have.

    Returns:
      The bits of each part, and the sum of their losses.

    Raises:
      ValueError: a budget below the least bits of all parts.
    """
    least = np.full(budget + 1, np.inf)  # least loss of the parts so far, by bits spent
    least[0] = 0.0
    choices = []
    for part in losses:
        after, choice = np.full(budget + 1, np.inf), np.zeros(budget + 1, int)
        for bits, loss in part.items():
            moved = np.full(budget + 1, np.inf)
            moved[bits:] = least[: budget + 1 - bits] + loss
            choice = np.where(moved < after, bits, choice)
            after = np.minimum(after, moved)
        choices.append(choice)
        least = after
    spent = int(np.argmin(least))
    total = float(least[spent])
    if not np.isfinite(total):
        raise ValueError(f"a budget of {budget} bits is too small for {len(losses)} parts")
    bits_of = []
    for choice in reversed(choices):
        bits_of.append(int(choice[spent]))
        spent -= bits_of[-1]
    return tuple(reversed(bits_of)), total
