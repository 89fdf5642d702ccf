"""Scalar codebooks for one coordinate of a randomly rotated vector.

A unit vector of dimension d, rotated at random, is uniform on the sphere; sqrt(d) times one of its
coordinates has unit variance and the density f(z) ~ (1 - z^2/d)^((d-3)/2), which tends to N(0, 1)
(TurboQuant, arXiv:2504.19874, Lemma 1). All levels here are on this *unit-variance* scale.

Everything is float64 numpy, computed once per (bits, dim) and cached: codebooks are constants.
"""

from functools import cache

import numpy as np
from jaxtyping import Float
from scipy import linalg, optimize, special, stats

Levels = Float[np.ndarray, " levels"]
Codebooks = Float[np.ndarray, "*codebooks levels"]


def _density(z: np.ndarray, dim: int | None) -> np.ndarray:
    if dim is None:
        return np.exp(-z * z / 2) / np.sqrt(2 * np.pi)
    log_peak = special.gammaln(dim / 2) - special.gammaln((dim - 1) / 2) - np.log(np.pi * dim) / 2
    with np.errstate(divide="ignore"):
        return np.exp(log_peak + special.xlog1py((dim - 3) / 2, -z * z / dim))


def _tail(z: np.ndarray, dim: int | None) -> np.ndarray:
    """P(Z > z) for z >= 0."""
    if dim is None:
        return special.ndtr(-z)
    return special.betainc((dim - 1) / 2, 0.5, np.clip(1 - z * z / dim, 0, 1)) / 2


def _tail_mean(z: np.ndarray, dim: int | None) -> np.ndarray:
    """E[Z; Z > z] for z >= 0, in closed form for both densities."""
    if dim is None:
        return _density(z, None)
    log_peak = special.gammaln(dim / 2) - special.gammaln((dim - 1) / 2) - np.log(np.pi) / 2
    body = np.clip(1 - z * z / dim, 0, 1) ** ((dim - 1) / 2)
    return np.sqrt(dim) * np.exp(log_peak) / (dim - 1) * body


def _check(bits: int, dim: int | None) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits: got {bits}, expected between 1 and 8")
    if dim is not None and dim < 2:
        raise ValueError(f"dim: got {dim}, expected at least 2, or None for the Gaussian limit")


def _moments(levels: Codebooks, dim: int | None) -> tuple[Codebooks, Codebooks]:
    """Probability and first moment of each cell of codebooks."""
    edges = thresholds(levels)
    tail = _tail(np.abs(edges), dim)
    tail = np.where(edges >= 0, tail, 1 - tail)
    mean = _tail_mean(np.abs(edges), dim)
    return -np.diff(tail, prepend=1.0, append=0.0), -np.diff(mean, prepend=0.0, append=0.0)


def thresholds(levels: Codebooks) -> Float[np.ndarray, "*codebooks levels-1"]:
    """Decision thresholds of a nearest-level quantizer: the midpoints of neighbouring levels."""
    return (levels[..., 1:] + levels[..., :-1]) / 2


def distortion(levels: Levels, dim: int | None) -> float:
    """Mean squared error per unit-variance coordinate, equal to D_b(dim) for Lloyd-Max levels."""
    probability, mean = _moments(levels, dim)
    return float(1 - 2 * levels @ mean + levels**2 @ probability)


def index_entropy(levels: Levels, dim: int | None) -> float:
    """Entropy of the code index in bits: what an ideal entropy coder would pay per coordinate."""
    probability, _ = _moments(levels, dim)
    return float(special.entr(probability).sum() / np.log(2))


def slope(levels: Levels, dim: int | None) -> float:
    """E[Z q(Z)]: the slope of <v, x~> on <v, x> in norm mode; 1 - D_b for Lloyd-Max levels."""
    _, mean = _moments(levels, dim)
    return float(levels @ mean)


@cache
def lloyd_max(bits: int, dim: int | None) -> Levels:
    """Levels with the least mean squared error: 2**bits of them, ascending and odd-symmetric.

    `dim=None` is the Gaussian limit. The start is the asymptotically optimal compander (density
    proportional to f^(1/3)); Newton on the stationarity conditions c_i = E[Z | cell i] follows,
    after as many Lloyd iterations as it needs to converge.

    Raises:
      ValueError: bits outside 1-8 or dim below 2.
    """
    _check(bits, dim)
    half = 2 ** (bits - 1)
    quantile = 0.5 + (np.arange(half) + 0.5) / (2 * half)
    if dim is None:
        positive = np.sqrt(3) * special.ndtri(quantile)
    else:
        shape = (dim + 3) / 6
        positive = np.sqrt(dim) * (2 * stats.beta.ppf(quantile, shape, shape) - 1)
    for _ in range(60):
        candidate = _newton(positive, dim)
        if candidate is not None:
            levels = np.concatenate([-candidate[::-1], candidate])
            levels.flags.writeable = False
            return levels
        for _ in range(50):
            positive = _lloyd(positive, dim)
    raise ArithmeticError(f"Lloyd-Max did not converge for bits={bits}, dim={dim}")


def _cells(positive: np.ndarray, dim: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inner edges (from 0), probability and first moment of the cells of the positive half."""
    edges = np.concatenate([[0.0], (positive[1:] + positive[:-1]) / 2])
    tail, mean = _tail(edges, dim), _tail_mean(edges, dim)
    return edges, tail - np.append(tail[1:], 0), mean - np.append(mean[1:], 0)


def _lloyd(positive: np.ndarray, dim: int | None) -> np.ndarray:
    _, probability, mean = _cells(positive, dim)
    return mean / probability


def _newton(positive: np.ndarray, dim: int | None) -> np.ndarray | None:
    """Solve c_i P_i - M_i = 0, a tridiagonal system; None where it leaves the ordered region."""
    for _ in range(30):
        edges, probability, mean = _cells(positive, dim)
        residual = positive * probability - mean
        weight = _density(edges, dim) / 2
        weight[0] = 0  # the edge at the origin is fixed by symmetry
        below = (positive - edges) * weight
        above = np.append((edges[1:] - positive[:-1]) * weight[1:], 0)
        banded = np.zeros((3, len(positive)))
        banded[1] = probability - below - above
        banded[0, 1:] = -above[:-1]
        banded[2, :-1] = -below[1:]
        step = linalg.solve_banded((1, 1), banded, residual)
        positive = positive - step
        top = np.inf if dim is None else np.sqrt(dim)
        if not (positive[0] > 0 and np.all(np.diff(positive) > 0) and positive[-1] < top):
            return None
        if np.max(np.abs(step)) < 1e-14 * positive[-1]:
            return positive
    # rounding in the tail probabilities keeps the outermost levels moving; the distortion is
    # stationary here, so that it changes by the square of this step
    return positive if np.max(np.abs(step)) < 1e-9 else None


@cache
def uniform(bits: int, dim: int | None) -> Levels:
    """Equally spaced odd-symmetric levels with the least-squares step: the ablation of Lloyd-Max.

    Raises:
      ValueError: bits outside 1-8 or dim below 2.
    """
    _check(bits, dim)
    grid = np.arange(2**bits) - (2**bits - 1) / 2
    widest = 2 * float(lloyd_max(bits, dim)[-1]) / (2**bits - 1) if bits > 1 else 4.0
    found = optimize.minimize_scalar(
        lambda step: distortion(grid * step, dim),
        bounds=(widest / 8, widest * 2),
        method="bounded",
        options={"xatol": 1e-12},
    )
    levels = grid * found.x
    levels.flags.writeable = False
    return levels


def grid_limit(bits: int) -> int:
    """Largest integer level of the GPU kernels' tables: how many bits the look-up has for a level.

    A byte look-up answers up to 3 bits. At 4 bits two tables are told apart by the sign bit of
    their bytes, which leaves 7 bits; from 5 bits on a level is two digits in base 128.
    """
    return 127 if bits <= 3 else 63 if bits == 4 else 8191


def on_grid(levels: Levels, dim: int | None) -> Levels:
    """Levels rounded to multiples of the step, within the grid's limit, that loses least.

    The kernels compute with these levels exactly, and so does everything else: there is no second,
    rounded definition. Costs 0.2 % of the distortion at 4 bits and less than 0.1 % elsewhere.
    """
    rounded = _on_grid(tuple(float(level) for level in levels), dim)
    rounded.flags.writeable = False
    return rounded


@cache
def _on_grid(levels: tuple[float, ...], dim: int | None) -> Levels:
    exact = np.asarray(levels)
    finest = exact[-1] / grid_limit(len(levels).bit_length() - 1)

    # the loss has many small local minima in the step: a scan, then nothing more to gain
    steps = np.linspace(finest, 1.25 * finest, 1001)[:, None]
    rounded = np.round(exact / steps) * steps
    probability, mean = _moments(rounded, dim)
    loss = np.sum(rounded**2 * probability - 2 * rounded * mean, axis=1)
    return rounded[np.argmin(loss)].copy()


def grid_integers(
    levels: Levels | tuple[float, ...], limit: int | None = None
) -> tuple[tuple[int, ...], float] | None:
    """Integers n_i within the limit and a step with levels_i = n_i step, or None.

    The limit is that of a scalar code's grid unless another is given.
    """
    bits = len(levels).bit_length() - 1
    found = grid_limit(bits) if limit is None else limit
    return _grid_integers(tuple(float(level) for level in levels), found)


@cache
def _grid_integers(levels: tuple[float, ...], limit: int) -> tuple[tuple[int, ...], float] | None:
    exact = np.asarray(levels)
    top = np.max(np.abs(exact))
    for largest in range(1, limit + 1):
        integers = np.round(exact * (largest / top))
        # float64 levels are multiples of a float64 step to a few units in the last place
        if np.max(np.abs(integers * (top / largest) - exact)) < 1e-12 * top:
            return tuple(int(n) for n in integers), float(top / largest)
    return None
