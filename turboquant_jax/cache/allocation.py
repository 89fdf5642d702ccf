"""Formats of each layer or head: how keys and values are coded, and which choice loses least."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import TypeGuard, cast

import numpy as np

Groups = tuple[tuple[int, int], ...]
Bits = int | Groups
"""Bits of every channel; or ((channels, bits), ...), which split the channels, largest first."""
Entry = Bits | tuple[Bits, ...]
"""Of a layer; or of each of its kv heads."""


@dataclass(frozen=True)
class Allocation:
    """Bits of the keys, and of the values, of every layer or of every head.

    An entry is the bits of a layer, or a tuple with those of each of its kv heads. Bits are an
    integer, or groups of channels, ((16, 4), (48, 1)): of a calibrated basis and with one scale
    where `CodecConfig.scales` says so. Integers need no basis.

    Raises:
      ValueError: keys and values of different layers or heads, or bits that are no integers from 1
        to 8.
    """

    keys: tuple[Entry, ...]
    values: tuple[Entry, ...]

    def __post_init__(self):
        if not self.keys or len(self.keys) != len(self.values):
            raise ValueError(
                f"keys and values: got bits of {len(self.keys)} and {len(self.values)} layers, "
                "expected as many, at least one"
            )
        for name in ("keys", "values"):
            for layer, entry in enumerate(getattr(self, name)):
                for bits in _heads(entry):
                    for own in [bits] if not is_split(bits) else [b for _, b in bits]:
                        if type(own) is not int or not 1 <= own <= 8:
                            raise ValueError(
                                f"bits: got {own!r} for the {name} of layer {layer}, "
                                "expected integers between 1 and 8"
                            )

    def check(self, num_layers: int, num_kv_heads: int, head_dim: int) -> None:
        """ValueError unless these are the bits of so many layers, heads and channels."""
        if len(self.keys) != num_layers:
            raise ValueError(
                f"allocation: got bits of {len(self.keys)} layers, expected {num_layers}"
            )
        for name in ("keys", "values"):
            for layer, entry in enumerate(getattr(self, name)):
                if isinstance(entry, tuple) and not is_split(entry) and len(entry) != num_kv_heads:
                    raise ValueError(
                        f"allocation: got {len(entry)} heads for the {name} of layer {layer}, "
                        f"expected {num_kv_heads}"
                    )
                for bits in filter(is_split, _heads(entry)):
                    if sum(channels for channels, _ in bits) != head_dim:
                        raise ValueError(
                            f"allocation: got groups {bits} for the {name} of layer {layer}, "
                            f"expected {head_dim} channels in all"
                        )

    @cached_property
    def layers(self) -> tuple[tuple[tuple[Bits, Bits], ...], ...]:
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
        """Bits per channel of the keys and of the values, the mean over layers and heads."""
        keys, values = (
            fmean(fmean(map(mean_bits, _heads(entry))) for entry in side)
            for side in (self.keys, self.values)
        )
        return keys, values

    @cached_property
    def kinds(self) -> tuple[tuple[Bits, Bits], ...]:
        """The different pairs, in the order in which layers and heads meet them."""
        return tuple(dict.fromkeys(pair for layer in self.layers for pair in layer))


def is_split(bits: object) -> TypeGuard[Groups]:
    """Whether these are groups of channels, and neither an integer nor bits of several heads."""
    return (
        isinstance(bits, tuple)
        and bits != ()
        and all(isinstance(group, tuple) and [*map(type, group)] == [int, int] for group in bits)
    )


def mean_bits(bits: Bits) -> float:
    """Bits per channel."""
    if isinstance(bits, int):
        return bits
    return sum(n * b for n, b in bits) / sum(n for n, _ in bits)


def _heads(entry: Entry) -> tuple[Bits, ...]:
    if isinstance(entry, tuple) and not is_split(entry):
        return cast(tuple[Bits, ...], entry)
    return (entry,)


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


@dataclass(frozen=True)
class Losses:
    """What each format of a head loses alone; losses of heads, and of keys and values, add up.

    Attributes:
      key_formats: the menu of keys.
      value_formats: the menu of values.
      keys: KL in nats a token, by layer, head and format of the menu.
      values: the same of values.
    """

    key_formats: tuple[Bits, ...]
    value_formats: tuple[Bits, ...]
    keys: tuple[tuple[tuple[float, ...], ...], ...]
    values: tuple[tuple[tuple[float, ...], ...], ...]

    def of(self, allocation: Allocation) -> float:
        """The sum over all heads; ValueError for a format that is not on the menu."""
        return sum(
            side[layer][head][menu.index(pair[which])]
            for which, (menu, side) in enumerate(self._sides)
            for layer, heads in enumerate(side)
            for head, pair in enumerate(_pairs(allocation.layers[layer], len(heads)))
        )

    @property
    def _sides(self):
        return (self.key_formats, self.keys), (self.value_formats, self.values)


def nested(array: np.ndarray) -> tuple:
    """The numbers of an array as tuples of tuples."""
    return tuple(map(nested, array)) if array.ndim > 1 else tuple(array.tolist())


def _pairs(layer: Sequence, heads: int) -> tuple:
    return tuple(layer) * (heads // len(layer))
