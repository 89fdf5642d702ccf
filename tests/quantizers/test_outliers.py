"""Mixed bits: honest arithmetic, and every group at the error of its own dimension."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from turboquant_jax.quantizers import bounds, codebook, outliers

KEY = jax.random.key(0)
OUTLIERS = np.array([3, 40, 41, 99, 100, 101, 7, 64])
ROUND_TRIP = jax.jit(lambda q, x: outliers.decode(q, outliers.encode(q, x)))


def samples(count: int = 4000, dim: int = 128) -> np.ndarray:
    """Gaussian vectors, 8 of whose channels are 8 times larger."""
    x = np.random.default_rng(0).normal(size=(count, dim)).astype(np.float32)
    x[:, OUTLIERS] *= 8
    return x


@pytest.mark.parametrize(
    ("split", "payload", "with_scales"),
    [
        (((32, 3), (96, 2)), 2.25, 2.50),  # the paper's "2.5 bits"
        (((32, 4), (96, 3)), 3.25, 3.50),  # and its "3.5"
        (((64, 3), (64, 2)), 2.50, 2.75),  # the split whose payload is 2.5
        (((128, 4),), 4.0, 4.125),
    ],
)
def test_bits_are_counted_honestly(split, payload, with_scales):
    q = outliers.create(KEY, np.arange(128), split, rotation="block_hadamard")
    assert q.bits_per_coordinate(scales=False) == payload
    assert q.bits_per_coordinate(scales=True) == with_scales
    codes = jax.eval_shape(outliers.encode, q, jax.ShapeDtypeStruct((5, 128), jnp.float32))
    assert codes.nbytes * 8 / (5 * 128) == with_scales


def test_channels_are_ordered_by_their_second_moment():
    x = samples()
    order = np.asarray(outliers.select_channels(x.reshape(40, 100, 128)))
    assert set(order[:8].tolist()) == set(OUTLIERS.tolist())
    np.testing.assert_array_equal(order, np.argsort(-np.mean(x.astype(np.float64) ** 2, axis=0)))
    tied = outliers.select_channels(jnp.ones((3, 5)))
    np.testing.assert_array_equal(tied, np.arange(5))


def assert_groups_have_their_own_distortion(q: outliers.MixedQuantizer) -> None:
    """Relative error of each group within 4 s.e. of D_b at the group's dimension."""
    x = np.random.default_rng(1).normal(size=(4000, 128)).astype(np.float32)
    back = np.asarray(ROUND_TRIP(q, x))
    start = 0
    for group in q.groups:
        channels = np.asarray(q.order)[start : start + group.dim]
        start += group.dim
        square = np.sum(x[:, channels] ** 2, axis=-1)
        error = np.sum((x - back)[:, channels] ** 2, axis=-1) / square
        exact = bounds.lloyd_max_distortion(group.bits, group.dim)
        assert abs(np.mean(error) - exact) < 4 * stats.sem(error)


def mixed() -> outliers.MixedQuantizer:
    order = np.random.default_rng(2).permutation(128)
    return outliers.create(KEY, order, ((32, 3), (96, 2)), scale="norm", scale_dtype=jnp.float32)


def test_groups_have_the_distortion_of_their_own_dimension():
    assert_groups_have_their_own_distortion(mixed())


def test_codebooks_divided_by_the_wrong_dimension_are_noticed():
    """Gaussian levels over sqrt(128) in the 32-dim group, as released: .126 instead of .0323."""
    q = mixed()
    levels = tuple((codebook.lloyd_max(3, None) * np.sqrt(32 / 128)).tolist())
    planted = replace(q, groups=(replace(q.groups[0], levels=levels), q.groups[1]))
    with pytest.raises(AssertionError):
        assert_groups_have_their_own_distortion(planted)
    assert codebook.distortion(np.array(levels), 32) == pytest.approx(0.126, abs=5e-4)


def test_splitting_pays_where_there_are_outliers():
    """8 of 128 channels times 8: uniform 2 bits .1148, split .0472 (published, 3 % allowed)."""
    x = samples()
    order = outliers.select_channels(x)

    def error(split) -> float:
        q = outliers.create(KEY, order, split, scale="norm")
        return float(np.mean(np.sum((x - ROUND_TRIP(q, x)) ** 2, -1) / np.sum(x**2, -1)))

    assert error(((32, 3), (96, 2))) == pytest.approx(0.0472, rel=0.03)
    assert error(((128, 2),)) == pytest.approx(0.1148, rel=0.03)


def test_order_is_undone_and_edges_are_kept():
    q = outliers.create(KEY, np.arange(16)[::-1], ((4, 8), (12, 8)), rotation="block_hadamard")
    x = np.random.default_rng(3).normal(size=(2, 3, 16)).astype(np.float32)
    np.testing.assert_allclose(ROUND_TRIP(q, x), x, atol=0.05)
    assert ROUND_TRIP(q, np.zeros((0, 16), np.float32)).shape == (0, 16)
    x[0, 1, 15] = np.nan  # the first channel of the order: its group of 4 is spoilt
    got = np.asarray(ROUND_TRIP(q, x))
    assert np.all(np.isnan(got[0, 1, 12:])) and np.sum(np.isnan(got)) == 4


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"order: got .* expected a permutation"):
        outliers.create(KEY, np.array([0, 0, 1, 2]), ((2, 3), (2, 2)))
    with pytest.raises(ValueError, match=r"split: got .* expected 16 channels in all"):
        outliers.create(KEY, np.arange(16), ((4, 3), (8, 2)))
    q = outliers.create(KEY, np.arange(16), ((4, 3), (12, 2)))
    with pytest.raises(ValueError, match=r"vectors: got shape \(3, 8\), expected dim 16"):
        outliers.encode(q, jnp.zeros((3, 8)))
