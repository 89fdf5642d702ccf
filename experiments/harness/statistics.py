"""Means with standard errors, and verdicts from intervals."""

import numpy as np
from jaxtyping import Float

from experiments.harness.experiment import Row, Verdict

SIGMAS = 4.0
"""Half width of the interval behind a verdict, in standard errors: 1 false alarm in 16,000."""


def mean_and_error(
    samples: Float[np.ndarray, "draws n"], *, independent: bool
) -> tuple[float, float]:
    """Mean and its standard error.

    Samples of one draw of the randomness (rotation, sketch) share it. Where the vectors are
    uniform on the sphere their errors are `independent` nevertheless; elsewhere each draw counts as
    one observation.
    """
    samples = np.asarray(samples, np.float64)
    units = samples.ravel() if independent else samples.mean(axis=1)
    return float(units.mean()), float(units.std(ddof=1) / np.sqrt(len(units)))


def is_below(mean: float, error: float, bound: float) -> Verdict:
    """Whether a mean stays below a bound."""
    if mean + SIGMAS * error <= bound:
        return "holds"
    return "does not hold" if mean - SIGMAS * error > bound else "undecided"


def are_below(verdicts: list[Verdict]) -> Verdict:
    """Several cases of `is_below` as one."""
    if "does not hold" in verdicts:
        return "does not hold"
    return "undecided" if "undecided" in verdicts else "holds"


def all_equal(deviations: list[float]) -> Verdict:
    """Whether every deviation, in standard errors, is within the interval."""
    return "holds" if max(map(abs, deviations)) <= SIGMAS else "does not hold"


def wilson(successes: int, trials: int, sigmas: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share, at 95 % unless told otherwise."""
    share, z2 = successes / trials, sigmas**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = sigmas * np.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    half = half / (1 + z2 / trials)
    return float(centre - half), float(centre + half)


def is_less(one: Row, other: Row, column: str = "kl") -> Verdict:
    """Whether a column of one row is below that of another, as if errors were independent."""
    error = (one[f"{column}_se"] ** 2 + other[f"{column}_se"] ** 2) ** 0.5
    return is_below(one[column] - other[column], error, 0.0)


def of_aim(verdict: Verdict) -> Verdict:
    """An aim of our own that does not hold is missed."""
    return "missed" if verdict == "does not hold" else verdict


def met(good: bool) -> Verdict:
    """An aim of our own that needs no interval."""
    return "holds" if good else "missed"
