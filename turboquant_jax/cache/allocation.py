"""Bits of each layer or head: how many keys and values get, and which choice loses least."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

import numpy as np

Bits = int | tuple[int, ...]


@dataclass(frozen=True)
class Allocation:
    """Bits per channel of the keys, and of the values, of every layer or of every head.

    An entry is the bits of a layer, or a tuple with those of each of its kv heads.

    Raises:
      ValueError: keys and values of different layers or heads, or bits that are no integers from 1
        to 8.
    """

    keys: tuple[Bits, ...]
    values: tuple[Bits, ...]

    def __post_init__(self):
        if not self.keys or len(self.keys) != len(self.values):
            raise ValueError(
                f"keys and values: got bits of {len(self.keys)} and {len(self.values)} layers, "
                "expected as many, at least one"
            )
        for name in ("keys", "values"):
            for layer, bits in enumerate(getattr(self, name)):
                for own in _heads(bits):
                    if type(own) is not int or not 1 <= own <= 8:
                        raise ValueError(
                            f"bits: got {own!r} for the {name} of layer {layer}, "
                            "expected integers between 1 and 8"
                        )

    def check(self, num_layers: int, num_kv_heads: int) -> None:
        """ValueError unless these are the bits of so many layers and heads."""
        if len(self.keys) != num_layers:
            raise ValueError(
                f"allocation: got bits of {len(self.keys)} layers, expected {num_layers}"
            )
        for name in ("keys", "values"):
            for layer, bits in enumerate(getattr(self, name)):
                if isinstance(bits, tuple) and len(bits) != num_kv_heads:
                    raise ValueError(
                        f"allocation: got {len(bits)} heads for the {name} of layer {layer}, "
                        f"expected {num_kv_heads}"
                    )

    @cached_property
    def layers(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """(bits of the keys, bits of the values) of every layer: one pair where its heads agree."""
        found = []
        for keys, values in zip(self.keys, self.values, strict=True):
            count = max(len(_heads(keys)), len(_heads(values)))
            heads = tuple(
                zip(*(_heads(x) * (count // len(_heads(x))) for x in (keys, values)), strict=True)
            )
            found.append(heads[:1] if len(set(heads)) == 1 else heads)
        return tuple(found)

    @property
    def means(self) -> tuple[float, float]:
        """Bits of the keys and of the values, the mean over layers and heads."""
        keys, values = (
            fmean(fmean(_heads(bits)) for bits in side) for side in (self.keys, self.values)
        )
        return keys, values

    @cached_property
    def kinds(self) -> tuple[tuple[int, int], ...]:
        """The different pairs, in the order in which layers and heads meet them."""
        return tuple(dict.fromkeys(pair for layer in self.layers for pair in layer))


def _heads(bits: Bits) -> tuple[int, ...]:
    return bits if isinstance(bits, tuple) else (bits,)


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
        raise ValueError(
            f"budget: got {budget} bits, expected at least the fewest of {len(losses)} parts"
        )
    bits_of = []
    for choice in reversed(choices):
        bits_of.append(int(choice[spent]))
        spent -= bits_of[-1]
    return tuple(reversed(bits_of)), total
