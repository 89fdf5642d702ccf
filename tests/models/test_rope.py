"""Rotary embedding against values worked out by hand and against its defining properties."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from turboquant_jax.attention.projection import apply_rope
from turboquant_jax.models.presets import PRESETS
from turboquant_jax.models.rope import inverse_frequencies, rotation_angles


def test_frequencies_by_hand(tiny_config):
    config = dataclasses.replace(tiny_config, head_dim=4, rope_theta=10_000.0)
    np.testing.assert_allclose(inverse_frequencies(config), [1.0, 0.01], rtol=1e-15)


def test_llama_3_scaling_by_hand():
    """theta 500,000, H 128, factor 8, low 1, high 4, original context 8,192.

    Pair i turns n_i = 8192 * 500000**(-i/64) / (2 pi) times: n_28 = 4.1872, n_29 = 3.4109,
    n_34 = 1.2235, n_35 = 0.9967. So pairs up to 28 are kept, from 35 on they are eight times
    slower, and pair 29 gets the share (3.4109 - 1) / 3 = 0.80363 of its own frequency.
    """
    plain = inverse_frequencies(PRESETS["llama-3-8b"])
    ratio = inverse_frequencies(PRESETS["llama-3.1-8b"]) / plain
    np.testing.assert_allclose(ratio[:29], 1)
    np.testing.assert_allclose(ratio[35:], 1 / 8)
    turns = 8192 * 500_000 ** (-29 / 64) / (2 * math.pi)
    kept = (turns - 1) / 3
    assert 0.8 < kept < 0.81
    np.testing.assert_allclose(ratio[29], kept + (1 - kept) / 8)
    assert np.all(np.diff(ratio[28:36]) < 0)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "smollm2-135m"])
def test_angles_are_exact_to_float32(name):
    config = PRESETS[name]
    positions = jnp.array([[0, 1, 777, config.max_position - 1]], jnp.int32)
    cos, sin = jax.jit(rotation_angles, static_argnums=0)(config, positions)
    assert cos.dtype == sin.dtype == jnp.float32
    exact = np.asarray(positions)[..., None] * inverse_frequencies(config)
    # a float32 frequency is off by at most 2**-24 of itself, so is the product
    tolerance = 2.5 * 2**-24 * exact.max() + 1e-6
    np.testing.assert_allclose(cos, np.cos(exact), atol=tolerance)
    np.testing.assert_allclose(sin, np.sin(exact), atol=tolerance)


@functools.partial(jax.jit, static_argnums=0)
def turn(config, x, positions):
    return apply_rope(x, *rotation_angles(config, positions))


def test_it_turns_the_pairs_of_the_halves(tiny_config):
    """As complex numbers x_i + j x_(i + H/2), times exp(j * position * frequency)."""
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 12))
    positions = jnp.array([[0, 1, 2, 3, 4], [7, 8, 9, 30, 31]], jnp.int32)
    got = turn(tiny_config, x, positions)
    angles = np.asarray(positions)[..., None, None] * inverse_frequencies(tiny_config)
    turned = (np.asarray(x)[..., :6] + 1j * np.asarray(x)[..., 6:]) * np.exp(1j * angles)
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=1e-5)


def test_scores_depend_on_the_distance_only(tiny_config):
    q, k = jax.random.normal(jax.random.key(1), (2, 1, 1, 1, 12))

    def score(of_q, of_k):
        turned = [
            np.asarray(turn(tiny_config, x, jnp.full((1, 1), p, jnp.int32)))
            for x, p in ((q, of_q), (k, of_k))
        ]
        return float(np.sum(turned[0] * turned[1]))

    assert score(13, 4) == pytest.approx(score(59, 50), abs=1e-4)
    assert score(13, 4) != pytest.approx(score(13, 5), abs=1e-2)


def test_bfloat16_stays_bfloat16_and_is_turned_in_float32(tiny_config):
    x = jax.random.normal(jax.random.key(2), (1, 4, 2, 12)).astype(jnp.bfloat16)
    positions = jnp.arange(4, dtype=jnp.int32)[None]
    got = turn(tiny_config, x, positions)
    assert got.dtype == jnp.bfloat16
    expected = turn(tiny_config, x.astype(jnp.float32), positions).astype(jnp.bfloat16)
    assert (got == expected).all()
