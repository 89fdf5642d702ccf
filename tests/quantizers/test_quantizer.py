"""What the quantizer promises for every vector: identities, bytes, edges, transformations."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from turboquant_jax.quantizers import bounds, codebook, quantizer

KEY = jax.random.key(0)
MODES = ("norm", "matched", "least_squares", "unbiased")
ROUND_TRIP = jax.jit(lambda q, x: quantizer.decode(q, quantizer.encode(q, x)))


def normal(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def exact(dim: int = 64, bits: int = 3, rotation: str = "hadamard", **options):
    return quantizer.create(KEY, dim, bits, rotation=rotation, scale_dtype=jnp.float32, **options)


def dot(a, b) -> np.ndarray:
    return np.sum(np.asarray(a, np.float64) * np.asarray(b, np.float64), axis=-1)


@pytest.mark.parametrize(("bits", "code"), [(1, "scalar"), (4, "scalar"), (2, "trellis")])
def test_scale_modes_keep_their_identities_for_every_vector(bits, code):
    x = np.concatenate([normal(50, 64), normal(50, 64) + 3, np.eye(64, dtype=np.float32)[:5]])
    quantizers = {mode: exact(bits=bits, code=code, scale=mode) for mode in MODES}
    back = jax.jit(lambda qs, x: {mode: ROUND_TRIP(q, x) for mode, q in qs.items()})(quantizers, x)
    square = dot(x, x)
    error = {mode: dot(x - y, x - y) / square for mode, y in back.items()}
    least = back["least_squares"]
    np.testing.assert_allclose(dot(x - least, least) / square, 0, atol=3e-6)
    np.testing.assert_allclose(dot(back["matched"], back["matched"]) / square, 1, atol=3e-6)
    np.testing.assert_allclose(dot(x, back["unbiased"]) / square, 1, atol=3e-6)
    cosine = dot(x, least) / np.sqrt(square * dot(least, least))
    np.testing.assert_allclose(error["least_squares"], 1 - cosine**2, atol=3e-6)
    np.testing.assert_allclose(error["matched"], 2 - 2 * cosine, atol=3e-6)
    np.testing.assert_allclose(error["unbiased"], 1 / cosine**2 - 1, atol=1e-5)
    for mode in MODES:
        assert np.all(error["least_squares"] <= error[mode] + 3e-6)


@pytest.mark.parametrize("bits", [1, 3, 5, 6, 8])
def test_indices_are_the_nearest_levels(bits):
    q = exact(bits=bits)
    z = normal(20, 64)
    nearest = np.argmin(np.abs(z[..., None] - np.array(q.levels)[None, None]), axis=-1)
    indices = jax.jit(quantizer.assign)(q, z)
    np.testing.assert_array_equal(indices, nearest)
    np.testing.assert_allclose(
        jax.jit(quantizer.code_levels)(q, indices), np.array(q.levels)[nearest], rtol=1e-6
    )


@pytest.mark.parametrize("bits", range(1, 9))
def test_bytes_are_the_payload_and_one_scale(bits):
    for dtype in (jnp.bfloat16, jnp.float32):
        q = quantizer.create(KEY, 128, bits, rotation="hadamard", scale_dtype=dtype)
        codes = jax.eval_shape(quantizer.encode, q, jax.ShapeDtypeStruct((7, 128), jnp.float32))
        assert codes.nbytes == 7 * (16 * bits + jnp.dtype(dtype).itemsize)
        assert q.bits == bits and q.dim == 128


DIMS = [(2, "haar"), (3, "haar"), (80, "haar"), (96, "block_hadamard"), (576, "block_hadamard")]


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize(("dim", "kind"), [*DIMS, (4096, "hadamard")])
def test_every_dim_is_served(dim, kind, bits):
    q = exact(dim, bits, rotation=kind, scale="norm")
    x = normal(200, dim)
    difference = x - ROUND_TRIP(q, x)
    error = dot(difference, difference) / dot(x, x)
    expected = bounds.lloyd_max_distortion(bits, dim)
    assert abs(np.mean(error) - expected) < 4 * np.std(error) / np.sqrt(200) + 1e-6


@pytest.mark.parametrize(
    ("scale", "code"), [*((mode, "scalar") for mode in MODES), ("least_squares", "trellis")]
)
def test_zero_comes_out_as_zero_nan_and_infinity_as_nan_and_neighbours_as_ever(scale, code):
    q = quantizer.create(KEY, 64, 2, rotation="hadamard", scale=scale, code=code)
    x = normal(5, 64)
    expected = np.asarray(ROUND_TRIP(q, x))
    x[1], x[2, 5], x[3, 6] = 0, np.nan, -np.inf
    got = np.asarray(ROUND_TRIP(q, x))
    assert np.all(got[1] == 0) and np.all(np.isnan(got[2:4]))
    np.testing.assert_array_equal(got[[0, 4]], expected[[0, 4]])


@pytest.mark.parametrize("scale", ["norm", "unbiased"])
def test_norms_over_the_range_of_bfloat16_scale_the_result_exactly(scale):
    """A power of two goes through encode and decode untouched, from 1e-37 to the largest."""
    q = quantizer.create(KEY, 64, 3, rotation="hadamard", scale=scale)
    x = normal(5, 64)
    x /= 2 * np.max(np.abs(x))
    expected = np.asarray(ROUND_TRIP(q, x), np.float64)
    for exponent in (-115, -60, -20, 20, 60, 120, 127):
        got = np.asarray(ROUND_TRIP(q, x * np.float32(2.0**exponent)), np.float64)
        # float32 may flush what is below its smallest normal number
        np.testing.assert_allclose(got, expected * 2.0**exponent, rtol=0, atol=1.2e-38)


def test_the_largest_and_the_smallest_of_16_bit_inputs():
    q = exact(bits=4, scale="matched")
    for dtype in (jnp.float16, jnp.bfloat16):
        for extreme in (jnp.finfo(dtype).max / 4, jnp.finfo(dtype).tiny * 4):
            # (x~ has entries a little larger than those of x, hence not the very largest)
            x = np.where(normal(3, 64) > 0, float(extreme), -float(extreme)).astype(dtype)
            back = np.asarray(ROUND_TRIP(q, x), np.float64)
            x = np.asarray(x, np.float64)
            np.testing.assert_allclose(dot(back, back) / dot(x, x), 1, rtol=1e-5)


def test_a_scale_beyond_float16_is_never_a_silent_number():
    q = quantizer.create(KEY, 64, 2, rotation="hadamard", scale_dtype=jnp.float16)
    x = np.full((2, 64), 1e6, np.float32)
    x[1] = 1
    got = np.asarray(ROUND_TRIP(q, x))
    assert not np.any(np.isfinite(got[0])) and np.all(np.isfinite(got[1]))


def test_empty_batches():
    for code in ("scalar", "trellis"):
        q = exact(code=code)
        codes = jax.jit(quantizer.encode)(q, jnp.zeros((2, 0, 64)))
        assert codes.nbytes == 0
        assert jax.jit(quantizer.decode)(q, codes).shape == (2, 0, 64)


def test_one_trace_serves_every_call():
    encode = jax.jit(chex.assert_max_traces(quantizer.encode, n=1))
    q, other = (quantizer.create(key, 64, 3) for key in jax.random.split(KEY))
    for turn, x in ((q, normal(3, 64)), (q, normal(3, 64) + 1), (other, normal(3, 64))):
        encode(turn, x)


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_jit_changes_nothing(self):
        q, x = exact(), normal(2, 3, 64)
        function = self.variant(lambda x: quantizer.decode(q, quantizer.encode(q, x)))
        chex.assert_trees_all_close(function(x), ROUND_TRIP(q, x), atol=1e-5)


def test_leading_axes_are_batches():
    q, x = exact(), normal(2, 3, 64)
    expected = ROUND_TRIP(q, x)
    mapped = jax.jit(jax.vmap(jax.vmap(ROUND_TRIP, (None, 0)), (None, 0)))(q, x)
    chex.assert_trees_all_close(mapped, expected, atol=1e-5)
    chex.assert_trees_all_close(ROUND_TRIP(q, x[1, 2]), expected[1, 2], atol=1e-5)


@pytest.mark.parametrize("scale", MODES)
def test_straight_through_gradients(scale):
    """Homogeneity fixes J x = x~ in every mode; norm mode is J = I + Pi^T e x^T / (|x| sqrt d)."""
    q = exact(scale=scale)
    x, tangent = normal(64), normal(64, seed=2)
    through = jax.jit(lambda x, t: jax.jvp(lambda x: quantizer.straight_through(q, x), (x,), (t,)))
    back, along = through(x, x)
    np.testing.assert_allclose(back, ROUND_TRIP(q, x), atol=2e-5)
    np.testing.assert_allclose(along, back, atol=2e-5)
    if scale == "norm":
        expected = tangent + (back - x) * (x @ tangent) / (x @ x)
        np.testing.assert_allclose(through(x, tangent)[1], expected, atol=2e-5)


@pytest.mark.parametrize("code", ["scalar", "trellis"])
def test_gradients_are_finite_at_zero_and_untouched_by_nan_neighbours(code):
    q = exact(code=code)
    x = normal(4, 64)
    x[1] = 0
    x[2, 3] = np.nan
    weight = normal(4, 64, seed=2)
    gradient = jax.jit(jax.grad(lambda x, w: jnp.sum(quantizer.straight_through(q, x) * w)))
    rows = np.array([0, 1, 3])
    got = np.asarray(gradient(x, weight))[rows]
    assert np.all(np.isfinite(got))
    np.testing.assert_allclose(got, gradient(x[rows], weight[rows]), rtol=1e-5, atol=1e-6)


def test_given_levels_are_used():
    levels = np.array([-1.5, -0.25, 0.5, 2.0])
    q = quantizer.create(KEY, 64, 2, codebook=levels)
    assert q.levels == tuple(levels)
    uniform = quantizer.create(KEY, 64, 2, codebook="uniform")
    np.testing.assert_array_equal(uniform.levels, codebook.uniform(2, 64))
    gaussian = quantizer.create(KEY, 64, 2, codebook="gaussian")
    np.testing.assert_array_equal(gaussian.levels, codebook.lloyd_max(2, None))


@pytest.mark.parametrize(("dim", "bits"), [(32, 3), (64, 4), (128, 5)])
def test_levels_on_the_grid_are_the_nearest_to_those_of_the_sphere(dim, bits):
    q = quantizer.create(KEY, dim, bits, rotation="identity", codebook="grid")
    integers, step = codebook.grid_integers(q.levels)
    np.testing.assert_allclose(np.array(integers) * step, q.levels, rtol=1e-12)
    sphere, gaussian = codebook.lloyd_max(bits, dim), codebook.lloyd_max(bits, None)
    assert np.max(np.abs(q.levels - sphere)) <= step / 2 * (1 + 1e-9)
    assert np.max(np.abs(q.levels - gaussian)) > step / 2, "the grid is too coarse to tell"


def test_scales_are_rounded_to_the_nearest_bfloat16_and_ties_to_even():
    """Vectors of 64 equal numbers: the scale of the norm mode is the number, in all its bits."""
    unit, little = 2.0**-7, 2.0**-18  # neighbours between 1 and 2 are `unit` apart
    tie, next_tie = 1 + unit / 2, 1 + 3 * unit / 2
    numbers = [1, tie - little, tie, tie + little, next_tie - little, next_tie, next_tie + little]
    rounded = [1, 1, 1, 1 + unit, 1 + unit, 1 + 2 * unit, 1 + 2 * unit]
    q = quantizer.create(KEY, 64, 2, rotation="identity", scale="norm")
    x = np.repeat(np.array(numbers, np.float32)[:, None], 64, axis=1)
    _, scale = jax.jit(quantizer.quantize)(q, x)
    assert scale.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(scale, np.float64), rounded)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "bits: got 9, expected between 1 and 8"),
        ({"scale": "l2"}, "scale: got 'l2', expected one of norm, "),
        ({"code": "vector"}, "code: got 'vector', expected one of scalar, trellis"),
        ({"codebook": "kmeans"}, "codebook: got 'kmeans', expected one of .* or levels"),
        (
            {"codebook": np.array([1.0, 0.0])},
            "codebook: got .* expected 4 strictly ascending levels",
        ),
        (
            {"codebook": "uniform", "code": "trellis"},
            "codebook: got 'uniform', expected lloyd_max or grid",
        ),
        ({"code": "trellis", "bits": 5}, "bits: got 5, expected 1, 2, 3 or 4"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        quantizer.create(KEY, 64, **{"bits": 2, "rotation": "hadamard", **options})


def test_vectors_of_another_dimension_are_refused():
    with pytest.raises(ValueError, match=r"vectors: got shape \(3, 32\), expected dim 64"):
        quantizer.encode(quantizer.create(KEY, 64, 2), jnp.zeros((3, 32)))
