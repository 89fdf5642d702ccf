"""Levels of the trellis code (`trellis`), trained ones and these on the kernels' grid. No JAX."""

from functools import cache

import numpy as np
from jaxtyping import Float
from scipy import special

from turboquant_jax.quantizers.trellis_levels import POSITIVE_LEVELS


def levels(bits: int) -> Float[np.ndarray, " levels"]:
    """The 2^(bits+1) trained levels, sorted, symmetric about 0, for unit-variance coordinates.

    Raises ValueError unless bits is 1, 2, 3 or 4.
    """
    if bits not in POSITIVE_LEVELS:
        raise ValueError(f"bits: got {bits}, expected 1, 2, 3 or 4 for the trellis code")
    positive = np.array(POSITIVE_LEVELS[bits])
    return np.concatenate([-positive[::-1], positive])


def grid_limit(bits: int) -> int:
    """Largest integer level of the GPU kernels' tables.

    A byte look-up answers up to 8 levels; 16 come in two halves told apart by their sign, which
    takes one off; 32 are two digits in base 128.
    """
    return {1: 127, 2: 127, 3: 126, 4: 8191}[bits]


@cache
def grid_levels(bits: int) -> Float[np.ndarray, " levels"]:
    """`levels`, rounded to integers times the step that loses least; the integers within the limit.

    The kernels compute with these levels exactly, and so does everything else that uses them.
    Costs less than 0.03 % of the error (tests/quantizers/test_trellis.py).

    Raises ValueError unless bits is 1, 2, 3 or 4.
    """
    exact = levels(bits)
    edges = special.ndtr((exact[1:] + exact[:-1]) / 2)
    weight = np.diff(edges, prepend=0.0, append=1.0)  # about how often each level is used
    finest = exact[-1] / grid_limit(bits)
    steps = np.linspace(finest, 1.25 * finest, 1001)
    rounded = [np.round(exact / step) * step for step in steps]
    best = min(rounded, key=lambda candidate: float(weight @ (candidate - exact) ** 2))
    best.flags.writeable = False
    return best
