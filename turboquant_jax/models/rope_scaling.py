"""How releases slow RoPE's frequencies for contexts longer than those of the training.

Each scaling divides the inverse frequency of every channel pair; YaRN also multiplies cosine and
sine. The formulas are those of transformers, `modeling_rope_utils`.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Protocol


class RopeScaling(Protocol):
    """What the scalings have in common."""

    @property
    def attention_factor(self) -> float:
        """What cosine and sine are multiplied by, so that scores are by its square."""

    def divisors(self, frequencies: Sequence[float], theta: float) -> tuple[float, ...]:
        """The divisor of each inverse frequency: R/2 in, `theta**(-2i/R)`, R/2 out."""


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Positions are divided by `factor` (Chen et al., arXiv 2306.15595)."""

    factor: float

    def __post_init__(self):
        require_positive("factor", self.factor)

    @property
    def attention_factor(self) -> float:
        """1: cosine and sine as they are."""
        return 1.0

    def divisors(self, frequencies: Sequence[float], theta: float) -> tuple[float, ...]:
        """`factor` for every pair."""
        return (float(self.factor),) * len(frequencies)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's rule for slowing the low frequencies, from Meta's release.

    A pair that turns more than `high_freq_factor` times within the original context keeps its
    frequency, one that turns less than `low_freq_factor` times is slowed by `factor`, and between
    the two the frequency (not its divisor) is interpolated linearly in the number of turns.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def __post_init__(self):
        for name, value in vars(self).items():
            require_positive(name, value)
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor: got {self.low_freq_factor}, "
                f"expected less than high_freq_factor = {self.high_freq_factor}"
            )

    @property
    def attention_factor(self) -> float:
        """1: cosine and sine as they are."""
        return 1.0

    def divisors(self, frequencies: Sequence[float], theta: float) -> tuple[float, ...]:
        """1 for fast pairs, `factor` for slow ones."""
        low, high = self.low_freq_factor, self.high_freq_factor

        def divisor(frequency: float) -> float:
            turns = self.original_max_position * frequency / (2 * math.pi)
            kept = _clip((turns - low) / (high - low))
            return 1.0 / (kept + (1.0 - kept) / self.factor)

        return tuple(map(divisor, frequencies))


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al., arXiv 2309.00071): as `Llama3Scaling`, but linear in the index of a pair.

    Attributes:
      factor: divisor of the slow frequencies.
      original_max_position: tokens of the training's context.
      attention_factor: of cosine and sine; see `yarn_attention_factor`.
      beta_fast, beta_slow: turns within the original context above which a pair keeps its
        frequency, and below which it is slowed by `factor`.
      truncate: whether the ends of the ramp between them are rounded to whole pairs, outwards.
    """

    factor: float
    original_max_position: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self):
        for name, value in vars(self).items():
            if name != "truncate":
                require_positive(name, value)
        if self.beta_slow >= self.beta_fast:
            raise ValueError(
                f"beta_slow: got {self.beta_slow}, expected less than beta_fast = {self.beta_fast}"
            )

    def divisors(self, frequencies: Sequence[float], theta: float) -> tuple[float, ...]:
        """1 for fast pairs, `factor` for slow ones."""
        pairs = len(frequencies)

        def index(turns: float) -> float:
            """Of the pair, a fraction, that turns so often within the original context."""
            length = self.original_max_position / (2 * math.pi * turns)
            return pairs * math.log(length) / math.log(theta)

        first, last = index(self.beta_fast), index(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * pairs - 1)
        if first == last:
            last += 0.001  # as transformers does: a step instead of a ramp
        slowed = (_clip((pair - first) / (last - first)) for pair in range(pairs))
        return tuple(1.0 / ((1.0 - part) + part / self.factor) for part in slowed)


@dataclasses.dataclass(frozen=True)
class TabulatedScaling:
    """The divisor of each pair as a table: GGUF has no other record of Llama 3.1's scaling."""

    table: tuple[float, ...]

    def __post_init__(self):
        for divisor in self.table:
            require_positive("divisor of a RoPE frequency", divisor)

    @property
    def attention_factor(self) -> float:
        """1: cosine and sine as they are."""
        return 1.0

    def divisors(self, frequencies: Sequence[float], theta: float) -> tuple[float, ...]:
        """The table; ValueError unless it has a divisor for each frequency."""
        if len(self.table) != len(frequencies):
            raise ValueError(f"got {len(self.table)} divisors, expected {len(frequencies)}")
        return self.table


def yarn_attention_factor(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """What YaRN multiplies cosine and sine by where the release does not say: 0.1 ln(factor) + 1.

    With both scales (DeepSeek) it is the ratio of 0.1 mscale ln(factor) + 1 for the two.
    """

    def of(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    return of(mscale) / of(mscale_all_dim) if mscale and mscale_all_dim else of(1.0)


def require_positive(name: str, value: object, *, whole: bool = False) -> None:
    """ValueError unless the value is a positive, finite number, or a positive integer."""
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not (number and 0 < value <= sys.float_info.max):  # type: ignore[operator]
        kind = "integer" if whole else "number"
        raise ValueError(f"{name}: got {value!r}, expected a positive {kind}")


def _clip(x: float) -> float:
    return min(max(x, 0.0), 1.0)
