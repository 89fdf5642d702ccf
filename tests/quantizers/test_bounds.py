"""The theorems' numbers against the published tables and independent evaluations."""

import numpy as np
import pytest
from scipy import integrate, special

from turboquant_jax.quantizers import bounds

# D 4^b of the exact rate-distortion function of the sphere at b = 1..8
SPHERE = {
    3: [0.7019, 0.3658, 0.1838, 0.0920, 0.0460, 0.0230, 0.0115, 0.0057],
    32: [0.9740, 0.9344, 0.8942, 0.8552, 0.8179, 0.7821, 0.7479, 0.7152],
    64: [0.9870, 0.9671, 0.9464, 0.9259, 0.9058, 0.8860, 0.8668, 0.8479],
    80: [0.9896, 0.9737, 0.9570, 0.9404, 0.9241, 0.9080, 0.8922, 0.8767],
    96: [0.9914, 0.9780, 0.9641, 0.9502, 0.9365, 0.9229, 0.9095, 0.8963],
    128: [0.9935, 0.9835, 0.9730, 0.9625, 0.9521, 0.9417, 0.9315, 0.9214],
    256: [0.9968, 0.9918, 0.9865, 0.9811, 0.9758, 0.9705, 0.9653, 0.9600],
    1536: [0.9995, 0.9986, 0.9977, 0.9968, 0.9959, 0.9950, 0.9941, 0.9932],
}
KAPPA = {32: 1.007842, 64: 1.003914, 96: 1.002608, 128: 1.001955, 256: 1.000977}
# d Var of prod at b = 1..5; the first one at 1536 is pi/2 - 1/1536 = 1.57015, often printed 1.5702
PROD_VARIANCE = {
    (64, "gaussian"): [1.5552, 0.5574, 0.1781, 0.05193, 0.01420],
    (128, "gaussian"): [1.5630, 0.5641, 0.1813, 0.05309, 0.01456],
    (256, "gaussian"): [1.5669, 0.5674, 0.1829, 0.05368, 0.01474],
    (1536, "gaussian"): [1.5701, 0.5702, 0.1843, 0.05417, 0.01489],
    (128, "orthogonal"): [0.5647, 0.2038, 0.0655, 0.01918, 0.00526],
}


@pytest.mark.parametrize("dim", SPHERE)
def test_sphere_distortion_equals_the_table(dim):
    got = [bounds.sphere_distortion(bits, dim) * 4.0**bits for bits in range(1, 9)]
    np.testing.assert_allclose(got, SPHERE[dim], rtol=0, atol=0.500001e-4)


def test_sphere_distortion_equals_a_circle_by_quadrature():
    """In two dimensions the channel is von Mises on the circle, whose entropy is an integral."""
    for k in (0.5, 3.0, 40.0):
        norm = integrate.quad(lambda t, k=k: np.exp(k * (np.cos(t) - 1)), -np.pi, np.pi)[0]
        cosine = special.ive(1, k) / special.ive(0, k)
        entropy = np.log(norm) + k * (1 - cosine)
        bits = (np.log(2 * np.pi) - entropy) / np.log(2) / 2
        assert bounds.sphere_distortion(bits, 2) == pytest.approx(1 - cosine**2, rel=1e-7)


@pytest.mark.parametrize("dim", [2, 3, 64, 1536, 4096])
def test_no_scalar_code_beats_the_sphere(dim):
    for bits in range(1, 9):
        ideal = bounds.sphere_distortion(bits, dim)
        assert ideal < bounds.lloyd_max_distortion(bits, dim)
        assert ideal < bounds.shannon_lower_bound(bits)


@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256, 1536, None])
def test_lloyd_max_keeps_theorem_1(dim):
    for bits in range(1, 9):
        assert bounds.lloyd_max_distortion(bits, dim) < bounds.mse_upper_bound(bits)


def test_theorem_constants():
    assert bounds.mse_upper_bound(1) * 4 == pytest.approx(2.7207, abs=5e-5)
    assert bounds.inner_product_upper_bound(2, 128) * 16 * 128 == pytest.approx(17.095, abs=5e-4)
    assert bounds.shannon_lower_bound(4) == 0.00390625
    assert bounds.lloyd_max_distortion(0, 64) == 1.0


@pytest.mark.parametrize("dim", KAPPA)
def test_qjl_constant_equals_the_table(dim):
    assert bounds.qjl_constant(dim) == pytest.approx(KAPPA[dim], abs=0.500001e-6)
    exact = np.sqrt(dim / 2) * special.gamma(dim / 2) / special.gamma((dim + 1) / 2)
    assert bounds.qjl_constant(dim) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(("dim", "sketch"), PROD_VARIANCE)
def test_prod_variance_equals_the_table(dim, sketch):
    for bits, printed in enumerate(PROD_VARIANCE[dim, sketch], start=1):
        digits = 5 if printed < 0.06 else 4
        got = bounds.prod_variance(bits, dim, sketch)
        assert got == pytest.approx(printed, abs=0.500001 * 10.0**-digits)
        assert got < dim * bounds.inner_product_upper_bound(bits, dim)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="sketch: got 'rows', expected 'gaussian' or 'orthogonal'"):
        bounds.prod_variance(2, 64, "rows")
    with pytest.raises(ValueError, match=r"bits and dim: got .* expected above 0 and at least 2"):
        bounds.sphere_distortion(0, 64)
