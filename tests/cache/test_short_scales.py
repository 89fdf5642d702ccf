"""Scales of 8 bits are as near as their steps allow, whatever the number."""

import jax.numpy as jnp
import numpy as np

from turboquant_jax.cache.short_scales import decode_scales, encode_scales


def test_every_bfloat16_becomes_the_nearest_code_of_its_page():
    """Against a search among all 254 numbers in float64; ties in the logarithm are none."""
    positive = np.arange(0x80, 0x7F80, dtype=np.uint16).view(jnp.bfloat16)
    for base in (1.0, 1.9921875, 3e-30, 1.17e38):
        base = np.asarray(base, jnp.bfloat16)
        below = positive[positive <= base][-128 * 12 :]  # twelve octaves
        codes, found = encode_scales(jnp.asarray(np.append(below, base)))
        assert np.asarray(found) == base and int(codes[-1]) == 254
        levels = np.float64(base) * 2.0 ** ((np.arange(1, 255) - 254) / 32)
        gap = np.abs(np.log2(below.astype(np.float64))[:, None] - np.log2(levels)[None])
        want = np.where(below.astype(np.float64) > levels[0] / 2, 1 + gap.argmin(1), 0)
        got = np.asarray(codes)[:-1].astype(int)
        # a table of logarithms to 2^-11 of a step
        apart = got != want
        assert np.all(np.abs(got - want)[apart] == 1) and apart.mean() < 2e-3
        kept = want > 1
        decoded = np.asarray(decode_scales(codes, found), np.float64)[:-1]
        error = decoded[kept] / below[kept].astype(np.float64) - 1
        assert np.abs(error).max() < 2 ** (1 / 64) * 1.00003 - 1
        # uniform within a step of ln 2 / 32
        assert abs(np.sqrt(np.mean(error**2)) / (np.log(2) / 32 / np.sqrt(12)) - 1) < 0.05


def test_what_is_no_positive_number():
    odd = jnp.asarray([0.0, -0.0, -2.0, np.nan, np.inf, -np.inf, 1e-39, 3.0], jnp.bfloat16)
    codes, base = encode_scales(odd)
    assert codes.tolist() == [0, 0, 0, 255, 255, 255, 0, 254] and float(base) == 3.0
    found = np.asarray(decode_scales(codes, base))
    np.testing.assert_array_equal(found, [0, 0, 0, np.nan, np.nan, np.nan, 0, 3])
    codes, base = encode_scales(odd[:7])
    assert float(base) == 0 and codes.tolist() == [0, 0, 0, 255, 255, 255, 0]


def test_pages_have_bases_of_their_own():
    scales = jnp.asarray([[1.0, 0.25], [64.0, 64.0]], jnp.bfloat16)
    codes, base = encode_scales(scales)
    assert codes.tolist() == [[254, 190], [254, 254]] and base.tolist() == [1.0, 64.0]
