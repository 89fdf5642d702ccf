"""The codecs of a cache: errors of each group, the scale modes asked for, rotations as operands."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from turboquant_jax import cache
from turboquant_jax.cache import codec, kernel_operands
from turboquant_jax.quantizers import bounds, rotation

HEADS = jnp.arange(2)  # rows of the codec
SPLIT = ((32, 3), (96, 2))


@jax.jit
def round_trip(made, x):
    rows = HEADS[: x.shape[1]]
    return made.unrotate(rows, made.dequantize(made.quantize(rows, x)))


def split_codec():
    """Two groups whose channels lie differently in each of two heads."""
    rng = np.random.default_rng(1)
    order = np.stack([rng.permutation(128) for _ in range(2)]).astype(np.int32)
    config = cache.CodecConfig(SPLIT, "haar", scale="norm")
    return codec.create(jax.random.key(0), config, 128, jnp.asarray(order))


def test_groups_have_the_distortion_of_their_own_dimension():
    """Relative error of each group within 4 s.e. of D_b at its dimension; the grid costs 0.1 %."""
    made = split_codec()
    x = np.random.default_rng(2).normal(size=(2000, 2, 128)).astype(np.float32)
    lost = (x - np.asarray(round_trip(made, x), np.float64)) ** 2
    for head in range(2):
        start = 0
        for channels, bits in SPLIT:
            place = np.asarray(made.order)[head, start : start + channels]
            start += channels
            error = lost[:, head, place].sum(-1) / (x[:, head, place].astype(float) ** 2).sum(-1)
            exact = bounds.lloyd_max_distortion(bits, channels)
            assert abs(np.mean(error) - exact) < 4 * stats.sem(error) + 1e-3 * exact


@pytest.mark.parametrize("modes", [("norm", "least_squares"), ("unbiased", "matched")])
def test_keys_and_values_have_the_scale_mode_asked_for(modes):
    """At 1 bit, where the modes are far apart, to the rounding of a scale to bfloat16."""
    config = cache.CacheConfig(1, 1, 64, *(cache.CodecConfig(1, scale=mode) for mode in modes))
    codecs = cache.create(config, 1, 8, key=jax.random.key(0)).parts[0].codecs
    x = np.random.default_rng(3).normal(size=(50, 1, 64)).astype(np.float32)
    for mode, made in zip(modes, codecs, strict=True):
        y = np.asarray(round_trip(made, x), np.float64)
        square = np.sum(x.astype(np.float64) ** 2, axis=-1)
        length, overlap = np.sum(y * y, axis=-1) / square, np.sum(x * y, axis=-1) / square
        got, expected = {
            "norm": (length, 1 - bounds.lloyd_max_distortion(1, 64)),  # the square of the level
            "matched": (length, 1.0),
            "least_squares": (overlap, length),
            "unbiased": (overlap, 1.0),
        }[mode]
        np.testing.assert_allclose(got, expected, rtol=2**-7, err_msg=mode)


@pytest.mark.parametrize("bits", [8, ((8, 4), (56, 3))])
def test_a_sketch_is_of_what_the_stored_codes_leave(bits):
    """Its norm is |x - s Pi^T c| to the rounding to bfloat16, also of zeros, huge and tiny vectors;

    NaN where x is, or where bfloat16 does not reach it. At 8 bits the rounding of s to bfloat16
    moves it by up to 1 %.
    """
    order = np.stack([np.random.default_rng(h).permutation(64) for h in range(2)])
    config = cache.CodecConfig(bits, "haar", code="prod")
    made = codec.create(jax.random.key(0), config, 64, jnp.asarray(order, jnp.int32))
    assert [group.bits for group in made.groups] == [7] if bits == 8 else [3, 2]
    x = np.random.default_rng(6).normal(size=(300, 2, 64)).astype(np.float32)
    x[0], x[1, 1] = 0, x[1, 1] * np.float32(1e30)
    x[2, 0] *= np.float32(1e-30)
    x[3, 0, 5] = np.nan
    x[3, 1] = np.inf if bits == 8 else np.sign(x[3, 1]) * np.float32(3e38)
    *groups, (signs, norm) = jax.jit(lambda made, x: made.quantize(HEADS, x))(made, x)
    assert signs.shape == (300, 2, 8) and norm.dtype == jnp.bfloat16
    plain = replace(made, sketch=None)
    first = jax.jit(lambda m, g: m.unrotate(HEADS, m.dequantize(g)))(plain, tuple(groups))
    with np.errstate(over="ignore"):
        want = np.linalg.norm(x.astype(np.float64) - np.asarray(first, np.float64), axis=-1)
    norm = np.asarray(norm, np.float64)
    assert np.isnan(norm[3]).all() and np.isfinite(np.delete(norm, 3, 0)).all()
    np.testing.assert_allclose(np.delete(norm, 3, 0), np.delete(want, 3, 0), rtol=2**-7)
    with pytest.raises(ValueError, match="sketch: got none"):
        plain.sketch_query(jnp.zeros(64))


def test_the_bfloat16_parts_of_a_rotation_sum_to_its_float32_matrix():
    """Exactly: three times 8 significant bits are the 24 of a float32."""
    haar = rotation.create("haar", jax.random.key(4), 64)
    made = split_codec()
    of_rotation = jax.jit(lambda r: kernel_operands.of_rotation(r, jnp.bfloat16))(haar)
    of_codec = jax.jit(kernel_operands.of_codec)(made, HEADS)
    for operand, matrix in ((of_rotation, haar.matrix[None]), (of_codec, made.matrix(HEADS))):
        assert operand.parts.dtype == jnp.bfloat16 and operand.gain == 1 and operand.signs is None
        np.testing.assert_array_equal(np.asarray(operand.parts, np.float64).sum(0), matrix)
