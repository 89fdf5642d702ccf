"""The theorems as functions of (bits, dim): what a quantizer may reach, and what it must.

Distortions are relative to the squared norm: D_mse = E|x - x~|^2 / |x|^2, and D_prod is the mean
squared error of <v, x~> for unit v. Equation numbers: TurboQuant, arXiv:2504.19874.
"""

import numpy as np
from scipy import optimize, special

from turboquant_jax.quantizers.codebook import distortion, lloyd_max


def mse_upper_bound(bits: int) -> float:
    """Theorem 1: D_mse <= (sqrt(3) pi / 2) 4^-bits for TurboQuant under a Haar rotation."""
    return float(np.sqrt(3) * np.pi / 2 * 4.0**-bits)


def inner_product_upper_bound(bits: int, dim: int) -> float:
    """Theorem 2: D_prod <= (sqrt(3) pi^2 / dim) 4^-bits for TurboQuant-prod and unit vectors."""
    return float(np.sqrt(3) * np.pi**2 / dim * 4.0**-bits)


def shannon_lower_bound(bits: int) -> float:
    """Theorem 3: 4^-bits. Asymptotic in dim; `sphere_distortion` is the exact finite-dim bound."""
    return 4.0**-bits


def lloyd_max_distortion(bits: int, dim: int | None) -> float:
    """Exact D_mse of TurboQuant-mse with the exact codebook (Equation 4 of the paper)."""
    return 1.0 if bits == 0 else distortion(lloyd_max(bits, dim), dim)


def qjl_constant(dim: int) -> float:
    """kappa_d = sqrt(d/2) Gamma(d/2) / Gamma((d+1)/2), the mean shrinkage of an orthogonal sketch.

    The rows of sqrt(d) Haar have norm sqrt(d) exactly where Gaussian rows have it on average, so
    that E|<row, r>| is sqrt(2/pi) kappa_d |r|: an estimator scaled for Gaussian rows is too large
    by kappa_d.
    """
    return float(
        np.sqrt(dim / 2) * np.exp(special.gammaln(dim / 2) - special.gammaln((dim + 1) / 2))
    )


def prod_variance(bits: int, dim: int, sketch: str) -> float:
    """dim * Var of <v, x~> under TurboQuant-prod, averaged over uniform unit v; unit x.

    `sketch` is "gaussian" (D_{b-1} (pi/2 - 1/d)) or "orthogonal", divided by kappa_d
    (D_{b-1} (pi / (2 kappa_d^2) - 1)).

    Raises:
      ValueError: an unknown sketch.
    """
    residual = lloyd_max_distortion(bits - 1, dim)
    if sketch == "gaussian":
        return residual * (np.pi / 2 - 1 / dim)
    if sketch == "orthogonal":
        return residual * (np.pi / (2 * qjl_constant(dim) ** 2) - 1)
    raise ValueError(f"sketch: got {sketch!r}, expected 'gaussian' or 'orthogonal'")


def _log_scaled_bessel_i(order: float, x: float) -> float:
    """log(exp(-x) I_order(x)); expansions where scipy's function underflows or gives up."""
    if x > 1e6 * (order + 1) ** 2:  # Abramowitz and Stegun 9.7.1
        return float(np.log1p(-(4 * order**2 - 1) / (8 * x)) - np.log(2 * np.pi * x) / 2)
    scaled = special.ive(order, x)
    if scaled > 1e-280:
        return float(np.log(scaled))
    # Debye's uniform expansion, A&S 9.7.7
    ratio = x / order
    root = np.hypot(1.0, ratio)
    p = 1 / root
    eta_minus_ratio = 1 / (root + ratio) + np.log(ratio / (1 + root))
    terms = [  # u_1..u_3 of Abramowitz and Stegun 9.3.9
        (3 * p - 5 * p**3) / 24,
        (81 * p**2 - 462 * p**4 + 385 * p**6) / 1152,
        (30375 * p**3 - 369603 * p**5 + 765765 * p**7 - 425425 * p**9) / 414720,
    ]
    series = 1 + sum(u / order ** (k + 1) for k, u in enumerate(terms))
    return float(order * eta_minus_ratio - np.log(2 * np.pi * order * root) / 2 + np.log(series))


def sphere_distortion(bits: float, dim: int) -> float:
    """Exact distortion-rate function of the uniform sphere: no code of this rate does better.

    The optimal backward channel is von Mises-Fisher with concentration k: D = 1 - A^2 with
    A = I_{d/2}(k) / I_{d/2-1}(k), and R = k A + ln[(k/2)^{d/2-1} / (Gamma(d/2) I_{d/2-1}(k))].
    It lies below 4^-bits, because the sphere has dimension d - 1.

    Args:
      bits: rate in bits per coordinate, above 0.
      dim: dimension of the vector, at least 2.
    """
    if bits <= 0 or dim < 2:
        raise ValueError(f"bits and dim: got {bits} and {dim}, expected above 0 and at least 2")
    order = dim / 2 - 1

    def cosine(k: float) -> float:
        return float(np.exp(_log_scaled_bessel_i(order + 1, k) - _log_scaled_bessel_i(order, k)))

    def excess_rate(log_k: float) -> float:
        k = np.exp(log_k)
        nats = k * (cosine(k) - 1) + order * np.log(k / 2) - special.gammaln(dim / 2)
        return nats - _log_scaled_bessel_i(order, k) - bits * dim * np.log(2)

    k = float(np.exp(optimize.brentq(excess_rate, np.log(1e-3), np.log(1e9 * dim), xtol=1e-13)))
    return (1 - cosine(k)) * (1 + cosine(k))
