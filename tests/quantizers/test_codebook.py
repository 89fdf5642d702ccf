"""Codebooks against the published tables, closed forms and independent quadrature."""

from decimal import Decimal

import numpy as np
import pytest
from scipy import integrate, special

from turboquant_jax.quantizers import bounds, codebook

# relative MSE of Lloyd-Max at b = 1..8
DISTORTION = {
    32: ".353357 .111600 .0322611 .00877383 2.29768e-3 5.88806e-4 1.49113e-4 3.75264e-5",
    64: ".358387 .114526 .0333908 .00913152 2.39923e-3 6.15963e-4 1.56145e-4 3.93168e-5",
    80: ".359389 .115115 .0336201 .00920447 2.42000e-3 6.21528e-4 1.57588e-4 3.96842e-5",
    96: ".360056 .115508 .0337735 .00925337 2.43394e-3 6.25264e-4 1.58556e-4 3.99309e-5",
    128: ".360889 .116000 .0339659 .00931479 2.45146e-3 6.29961e-4 1.59774e-4 4.02412e-5",
    200: ".361787 .116533 .0341746 .00938149 2.47050e-3 6.35069e-4 1.61099e-4 4.05787e-5",
    256: ".362136 .116740 .0342560 .00940753 2.47794e-3 6.37065e-4 1.61617e-4 4.07107e-5",
    512: ".362758 .117111 .0344017 .00945418 2.49127e-3 6.40644e-4 1.62545e-4 4.09473e-5",
    1536: ".363173 .117358 .0344990 .00948538 2.50020e-3 6.43039e-4 1.63167e-4 4.11057e-5",
    3072: ".363277 .117420 .0345234 .00949319 2.50243e-3 6.43639e-4 1.63322e-4 4.11454e-5",
    None: ".363380 .117482 .0345478 .00950101 2.50467e-3 6.44240e-4 1.63478e-4 4.11851e-5",
}
# positive levels at b = 1, 2, ..., unit variance
LEVELS = {
    64: [
        ".801007",
        ".452119 1.499975",
        ".243753 .750658 1.329343 2.111311",
        ".127352 .384718 .650494 .931894 1.239404 1.590849 2.023310 2.646370",
    ],
    80: [
        ".800382",
        ".452254 1.502061",
        ".244022 .751727 1.332239 2.119338",
        ".127560 .385383 .651742 .933970 1.242739 1.596221 2.032299 2.663219",
    ],
    96: [
        ".799965",
        ".452343 1.503453",
        ".244201 .752439 1.334174 2.124716",
        ".127699 .385826 .652576 .935358 1.244971 1.599822 2.038334 2.674560",
    ],
    128: [
        ".799444",
        ".452453 1.505193",
        ".244425 .753330 1.336599 2.131471",
        ".127873 .386381 .653619 .937097 1.247770 1.604343 2.045925 2.688859",
        ".06557 .19707 .32970 .46425 .60159 .74275 .88892 1.04160 1.20270 1.37480 1.56154 1.76834 "
        "2.00404 2.28456 2.64423 3.18658",
    ],
    256: [
        ".798664",
        ".452618 1.507805",
        ".244760 .754667 1.340247 2.141669",
        ".128134 .387214 .655187 .939714 1.251989 1.611168 2.057411 2.710567",
    ],
    None: [
        ".797885",
        ".452780 1.510418",
        ".245094 .756005 1.343909 2.151946",
        ".128395 .388048 .656759 .942340 1.256231 1.618046 2.069017 2.732590",
    ],
}
# index entropy in bits at b = 1..8
ENTROPY = {
    64: "1.0000 1.9179 2.8379 3.7825 4.7494 5.7310 6.7212 7.7161",
    128: "1.0000 1.9145 2.8314 3.7739 4.7396 5.7206 6.7104 7.7052",
    None: "1.0000 1.9111 2.8249 3.7653 4.7298 5.7101 6.6996 7.6941",
}
# excess error in per cent of the Gaussian codebook on the sphere at b = 2..5
GAUSSIAN_EXCESS = {
    32: ".07 .66 1.74 2.80",
    64: ".02 .16 .43 .75",
    96: ".01 .07 .19 .34",
    128: ".00 .04 .11 .19",
}
DIMS = [2, 3, 4, 5, 7, 80, 576, 4096, None]


def assert_digits(got, printed: str) -> None:
    """`got` rounds to the printed numbers, to every digit that is printed."""
    texts = printed.split()
    half_units = [0.5 * 10.0 ** Decimal(text).as_tuple().exponent for text in texts]
    error = np.abs(np.asarray(got) - np.array([float(text) for text in texts]))
    assert np.all(error <= np.array(half_units) * (1 + 1e-6)), (got, printed)


@pytest.mark.parametrize("dim", DISTORTION)
def test_distortion_equals_the_table(dim):
    got = [codebook.distortion(codebook.lloyd_max(bits, dim), dim) for bits in range(1, 9)]
    assert_digits(got, DISTORTION[dim])


@pytest.mark.parametrize("dim", LEVELS)
def test_levels_equal_the_table(dim):
    for bits, printed in enumerate(LEVELS[dim], start=1):
        assert_digits(codebook.lloyd_max(bits, dim)[2 ** (bits - 1) :], printed)


@pytest.mark.parametrize("dim", ENTROPY)
def test_entropy_equals_the_table(dim):
    got = [codebook.index_entropy(codebook.lloyd_max(bits, dim), dim) for bits in range(1, 9)]
    assert_digits(got, ENTROPY[dim])


@pytest.mark.parametrize("dim", GAUSSIAN_EXCESS)
def test_cost_of_the_gaussian_codebook_equals_the_table(dim):
    got = [
        codebook.distortion(codebook.lloyd_max(bits, None), dim)
        / codebook.distortion(codebook.lloyd_max(bits, dim), dim)
        for bits in range(2, 6)
    ]
    assert_digits(100 * (np.array(got) - 1), GAUSSIAN_EXCESS[dim])


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dim", DIMS)
def test_levels_are_symmetric_ordered_and_stationary(bits, dim):
    levels = codebook.lloyd_max(bits, dim)
    np.testing.assert_array_equal(levels, -levels[::-1])
    assert levels.shape == (2**bits,) and np.all(np.diff(levels) > 0)
    assert dim is None or levels[-1] < np.sqrt(dim)
    # every level is the mean of its cell, which is E[Z q(Z)] = E[q(Z)^2] = 1 - D when summed up
    assert codebook.slope(levels, dim) == pytest.approx(
        1 - codebook.distortion(levels, dim), abs=1e-12
    )
    # and moving any of them makes it worse
    for j in range(0, 2**bits, max(1, 2**bits // 4)):
        moved = levels.copy()
        moved[j] += 1e-3 * (levels[-1] - levels[0]) / 2**bits
        assert codebook.distortion(moved, dim) > codebook.distortion(levels, dim)


def _density(z: float, dim: int | None) -> float:
    if dim is None:
        return np.exp(-z * z / 2) / np.sqrt(2 * np.pi)
    peak = special.gamma(dim / 2) / special.gamma((dim - 1) / 2) / np.sqrt(np.pi * dim)
    return peak * (1 - z * z / dim) ** ((dim - 3) / 2)


@pytest.mark.parametrize(("bits", "dim"), [(1, 3), (2, 5), (3, 16), (4, 128), (3, None)])
def test_integrals_equal_quadrature(bits, dim):
    levels = codebook.uniform(bits, dim)  # not stationary: all terms of the integrals count
    top = 12.0 if dim is None else np.sqrt(dim)
    edges = np.concatenate([[-top], codebook.thresholds(levels), [top]])

    def expect(of) -> list[float]:
        return [
            integrate.quad(lambda z, c=c: of(z, c) * _density(z, dim), lo, hi, epsabs=1e-13)[0]
            for c, lo, hi in zip(levels, edges[:-1], edges[1:])
        ]

    probability = np.array(expect(lambda z, c: 1.0))
    assert codebook.distortion(levels, dim) == pytest.approx(
        sum(expect(lambda z, c: (z - c) ** 2)), rel=1e-9
    )
    assert codebook.slope(levels, dim) == pytest.approx(sum(expect(lambda z, c: z * c)), rel=1e-9)
    assert codebook.index_entropy(levels, dim) == pytest.approx(
        -np.sum(probability * np.log2(probability)), rel=1e-9
    )


@pytest.mark.parametrize("bits", range(1, 9))
def test_three_dimensions_have_the_uniform_quantizer(bits):
    """Archimedes: a coordinate of the sphere in 3 dimensions is uniform, hence D = 4^-b."""
    assert codebook.distortion(codebook.lloyd_max(bits, 3), 3) == pytest.approx(4.0**-bits)
    np.testing.assert_allclose(
        codebook.lloyd_max(bits, 3), codebook.uniform(bits, 3), rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("dim", [2, 3, 32, 128, 4096])
def test_one_bit_has_a_closed_form(dim):
    kappa = bounds.qjl_constant(dim)
    assert codebook.distortion(codebook.lloyd_max(1, dim), dim) == pytest.approx(
        1 - 2 / np.pi * kappa**2, rel=1e-10
    )


@pytest.mark.parametrize("dim", [64, None])
@pytest.mark.parametrize("bits", range(1, 9))
def test_uniform_levels_have_the_best_step(bits, dim):
    levels = codebook.uniform(bits, dim)
    np.testing.assert_allclose(np.diff(levels), levels[1] - levels[0], rtol=1e-12)
    best = codebook.distortion(levels, dim)
    assert best >= codebook.distortion(codebook.lloyd_max(bits, dim), dim) * (1 - 1e-12)
    for factor in (0.99, 1.01):
        assert codebook.distortion(levels * factor, dim) > best


@pytest.mark.parametrize("dim", [64, None])
@pytest.mark.parametrize("bits", (1, 2, 3, 4, 5, 8))
def test_grid_levels_are_small_integers_and_cost_little(bits, dim):
    levels = codebook.lloyd_max(bits, dim)
    on_grid = codebook.on_grid(levels, dim)
    integers, step = codebook.grid_integers(on_grid)
    np.testing.assert_allclose(np.array(integers) * step, on_grid, rtol=1e-12)
    assert np.max(np.abs(integers)) <= codebook.grid_limit(bits)
    allowed = 1.0025 if bits == 4 else 1.001
    assert codebook.distortion(on_grid, dim) < allowed * codebook.distortion(levels, dim)


def test_levels_off_the_grid_have_no_integers():
    assert codebook.grid_integers(codebook.lloyd_max(4, 128)) is None


@pytest.mark.parametrize("make", [codebook.lloyd_max, codebook.uniform])
def test_bad_arguments_are_named(make):
    for bits in (0, 9):
        with pytest.raises(ValueError, match=f"bits: got {bits}, expected between 1 and 8"):
            make(bits, 64)
    with pytest.raises(ValueError, match="dim: got 1, expected at least 2"):
        make(4, 1)
