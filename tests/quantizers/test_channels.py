"""Groups of channels with one scale, against float64: products, predicted errors, edges."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from turboquant_jax.cache.calibration import from_moments
from turboquant_jax.quantizers import bounds, channels, quantizer

DIM, HEADS, COUNT = 64, 2, 3000
SPLIT = ((16, 4), (16, 2), (32, 1))
RNG = np.random.default_rng(0)


def moments(shape, rng, spread):
    """Second moments [*heads, H, H]; variances of `spread` to 1 / spread."""
    turn = np.linalg.qr(rng.normal(size=(*shape, shape[-1])))[0]
    variance = np.geomspace(spread, 1 / spread, shape[-1])
    return (turn * variance) @ np.swapaxes(turn, -1, -2)


OF_X, OF_Q = (moments((HEADS, DIM), RNG, 8) for _ in range(2))
BASIS = from_moments(OF_X, OF_Q)


def gaussian(moment, count):
    """Vectors [count, heads, H] of these second moments."""
    roots = np.linalg.cholesky(moment)
    return np.einsum("hij,nhj->nhi", roots, RNG.normal(size=(count, HEADS, DIM)))


X, Q = gaussian(OF_X, COUNT), gaussian(OF_Q, COUNT)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def create(split, least="vector", code="scalar", codebook="lloyd_max"):
    return channels.create(
        jax.random.key(1),
        BASIS,
        split,
        least=least,
        rotation="hadamard",
        code=code,
        codebook=codebook,
        scale_dtype=jnp.float32,
    )


@jax.jit
def coded(groups, transform, x):
    """c, and the scale."""
    indices, scale = channels.quantize(groups, transform, x)
    levels = [quantizer.code_levels(g, i) for g, i in zip(groups, indices, strict=True)]
    return jnp.concatenate(levels, axis=-1), scale


def test_products_are_kept():
    """To what rounding T and T^-T to float32 leaves."""
    _, transform = create(SPLIT)
    matrix, dual = (np.asarray(m, np.float64) for m in (transform.matrix, transform.dual))
    u, q = (np.einsum("hij,nhj->nhi", m, x) for m, x in ((matrix, X), (dual, Q)))
    products = np.sum(Q * X, axis=-1)
    np.testing.assert_allclose(np.sum(q * u, axis=-1), products, atol=1e-4 * products.std())
    unit = np.swapaxes(dual, -1, -2) @ matrix
    np.testing.assert_allclose(unit, np.broadcast_to(np.eye(DIM), unit.shape), atol=1e-4)


def test_every_channel_that_is_coded_has_variance_1_and_the_querys_have_the_groups():
    """E u u^T has a diagonal of 1 and E q q^T one of s_g^4, in the moments of the calibration.

    To the rounding of the basis to float16, 2^-11 of an entry, which a square doubles.
    """
    _, transform = create(SPLIT)
    matrix, dual = (np.asarray(m, np.float64) for m in (transform.matrix, transform.dual))
    of_u = np.diagonal(matrix @ OF_X @ np.swapaxes(matrix, 1, 2), axis1=1, axis2=2)
    np.testing.assert_allclose(of_u, np.ones_like(of_u), rtol=1e-3)
    of_q = np.diagonal(dual @ OF_Q @ np.swapaxes(dual, 1, 2), axis1=1, axis2=2)
    np.testing.assert_allclose(of_q, fourth_powers(SPLIT), rtol=1e-3)


def fourth_powers(split):
    """s_g^4 of every channel, [heads, H], from eigenvalues of the product of the moments."""
    values = np.sort(np.linalg.eigvals(OF_X @ OF_Q).real)[:, ::-1]
    root, start, found = np.sqrt(np.maximum(values, 1e-5 * values[:, :1])), 0, []
    for count, _ in split:
        mean = root[:, start : start + count].mean(axis=1, keepdims=True)
        found.append(np.repeat(mean**2, count, axis=1))
        start += count
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize(("least", "power"), [("vector", 1), ("product", 2)])
def test_codes_are_the_nearest_levels_and_the_scale_is_the_weighted_least_squares_one(least, power):
    groups, transform = create(SPLIT, least)
    c, scale = (np.asarray(x, np.float64) for x in coded(groups, transform, X[:40]))
    u = np.einsum("hij,nhj->nhi", np.asarray(transform.matrix, np.float64), X[:40])
    z = u / np.sqrt(np.mean(u * u, axis=-1, keepdims=True))
    start = 0
    for group, (count, bits) in zip(groups, SPLIT, strict=True):
        levels = np.asarray(group.levels, np.float32)
        assert len(levels) == 2**bits
        part = z[..., start : start + count]
        nearest = levels[np.argmin(np.abs(part[..., None] - levels), axis=-1)]
        assert np.mean(nearest == c[..., start : start + count]) > 0.999
        start += count
    weight = fourth_powers(SPLIT) ** (power / 4)
    for n, head in np.ndindex(scale.shape):
        design, target = weight[head] * c[n, head], weight[head] * u[n, head]
        best = np.linalg.lstsq(design[:, None], target, rcond=None)[0][0]
        assert abs(scale[n, head] - best) < 1e-4 * best


def score_error(split, *options):
    """E <q, x - x~>^2 of each head, over q in its expectation and the sampled x."""
    groups, transform = create(split, *options)
    c, scale = (np.asarray(x, np.float64) for x in coded(groups, transform, X))
    matrix = np.asarray(transform.matrix, np.float64)
    lost = X - np.einsum("hij,nhj->nhi", np.linalg.inv(matrix), c * scale[..., None])
    return np.einsum("nhi,hij,nhj->nh", lost, OF_Q, lost).mean(axis=0)


@pytest.mark.parametrize("split", [SPLIT, ((32, 3), (32, 1))])
def test_the_error_of_scores_is_what_the_groups_variances_predict(split):
    """Each channel of u errs by D_b, and q meets it with variance s_g^4; within 5 %.

    Uniform bits on a rotation err by D_2 |x|^2 / H in every direction: tr(S_x) tr(S_q) D_2 / H.
    """
    fourth, start, expected = fourth_powers(split), 0, 0.0
    for count, bits in split:
        part = fourth[:, start : start + count].sum(axis=1)
        expected = expected + part * bounds.lloyd_max_distortion(bits, DIM)
        start += count
    found = score_error(split, "product")
    np.testing.assert_allclose(found, expected, rtol=0.05)
    uniform = quantizer.create(jax.random.key(1), DIM, 2, rotation="hadamard")
    codes = jax.jit(lambda x: quantizer.decode(uniform, quantizer.encode(uniform, x)))
    lost = X - np.asarray(codes(jnp.asarray(X, jnp.float32)), np.float64)
    plain = np.einsum("nhi,hij,nhj->nh", lost, OF_Q, lost).mean(axis=0)
    trace = np.trace(OF_X, axis1=1, axis2=2) * np.trace(OF_Q, axis1=1, axis2=2)
    np.testing.assert_allclose(plain, trace * bounds.lloyd_max_distortion(2, DIM) / DIM, rtol=0.05)
    assert np.all(found < plain / 2.5), "the same bytes"


def test_a_trellis_errs_less_and_either_scale_errs_least_in_its_own_measure():
    scalar = {least: score_error(SPLIT, least) for least in ("vector", "product")}
    trellis = score_error(SPLIT, "product", "trellis")
    assert np.all(trellis < 0.9 * scalar["product"])
    assert np.all(scalar["product"] < scalar["vector"])


def test_zero_huge_and_not_finite_vectors_are_coded_apart_from_their_neighbours():
    groups, transform = create(SPLIT)
    x = np.asarray(X[:6], np.float32)
    x[1], x[2] = 0, np.float32(1e34) * x[2]
    x[3, 0, 5], x[4, 1, 7] = np.nan, -np.inf
    _, scale = coded(groups, transform, x)
    _, alone = coded(groups, transform, np.asarray(X[:6], np.float32))
    scale, alone = np.asarray(scale), np.asarray(alone)
    assert np.all(scale[1] == 0)
    np.testing.assert_allclose(scale[2], np.float32(1e34) * alone[2], rtol=1e-5)
    assert np.isnan(scale[3, 0]) and np.isnan(scale[4, 1]) and np.isnan(scale).sum() == 2
    for n, head in ((0, 0), (0, 1), (3, 1), (4, 0), (5, 0), (5, 1)):
        assert scale[n, head] == alone[n, head]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="expected 64 channels in all"):
        channels.create(jax.random.key(0), BASIS, ((16, 4), (32, 2)), least="vector")
    with pytest.raises(ValueError, match="least: got 'score', expected one of vector, product"):
        channels.create(jax.random.key(0), BASIS, SPLIT, least="score")
