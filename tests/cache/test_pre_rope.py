"""The mean before RoPE, at places that no test can fill: against complex numbers in float64."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.layout import CODEC, mean_at
from turboquant_jax import cache
from turboquant_jax.attention import head_rotation
from turboquant_jax.cache import pre_rope
from turboquant_jax.cache.state import rows_of

CAPACITY = 2**20 + 200
SHAPE = dict(num_layers=1, num_kv_heads=1, sinks=4, window=0, dtype="float32")
# Two factors rounded to 2**-12 of their cosines and sines at most, these 13 bits, and a table of
# bytes: what may be left of a key that is nothing but a mean of norm 1.
RESIDUE = (2 * 2.0**0.5 + 1) * 2.0**-12 + 2.0**0.5 / 254
WHOLE = tuple(float(w) for w in 10_000.0 ** -(np.arange(16) / 16))


def config_of(frequencies=WHOLE, **rest):
    return cache.CacheConfig(head_dim=32, **SHAPE | dict(rope_frequencies=frequencies) | rest)


def true_mean_at(config, mean, position):
    """R_p m with exact angles: float64 [K, T, H]."""
    count = len(config.rope_frequencies)
    turned = np.exp(1j * np.outer(position, config.rope_frequencies))
    pairs = (mean[:, None, :count] + 1j * mean[:, None, count : 2 * count]) * turned
    rest = np.broadcast_to(mean[:, None, 2 * count :], (*pairs.shape[:2], 32 - 2 * count))
    return np.concatenate([pairs.real, pairs.imag, rest], axis=-1)


@pytest.mark.parametrize("frequencies", [WHOLE, WHOLE[:10]], ids=["whole", "partial"])
def test_the_mean_turns_with_the_position(frequencies):
    config, rng = config_of(frequencies), np.random.default_rng(0)
    mean = rng.normal(0, 100, (1, 32)).astype(np.float32)
    index = np.concatenate([[0, 63, 64, 4095, 4096, 2**20 - 1], rng.integers(0, 2**20, 50)])
    phases = pre_rope.create(config, CAPACITY)
    found = pre_rope.mean_at(jnp.asarray(mean), phases, jnp.asarray(index, jnp.int32))
    found = np.swapaxes(np.asarray(found, float), 0, 1)
    size = np.linalg.norm(mean)
    documented = mean_at(config, mean.astype(float), config.sinks + index)
    assert np.abs(found - documented).max() < 2.0**-12 * size  # 13 bits of what is turned
    true = true_mean_at(config, mean.astype(float), config.sinks + index)
    assert np.linalg.norm(found - true, axis=-1).max() < RESIDUE * size


def test_fused_sums_change_no_bit():
    """Compiled as one or operation by operation."""
    config, rng = config_of(), np.random.default_rng(1)
    keys = jnp.asarray(rng.normal(0, 1, (64, 1, 32)), jnp.float32)
    mean = jnp.asarray(rng.normal(0, 100, (1, 32)), jnp.float32)
    phases, index = pre_rope.create(config, CAPACITY), jnp.arange(64, 128, dtype=jnp.int32)
    args = keys, mean, phases, index
    by_itself = [np.asarray(x) for x in (pre_rope.center(*args), pre_rope.mean_at(*args[1:]))]
    fused = jax.jit(lambda *args: (pre_rope.center(*args), pre_rope.mean_at(*args[1:])))(*args)
    for alone, together in zip(by_itself, fused, strict=True):
        np.testing.assert_array_equal(alone, together)


@pytest.mark.parametrize("size", [1.0, 1_000.0])
@pytest.mark.parametrize("levels", ["equal", "8 bits"])
def test_scores_of_turned_means_come_back(size, levels):
    """Keys that are nothing but R_p m, to the millionth token: what comes back is their score.

    Equal levels know nothing of what is left of a key, 8 bits nearly all of it.
    """
    config = config_of(key=CODEC(8), value=CODEC(8), sliding_window=65)  # of few pages
    rng = np.random.default_rng(2)
    mean = rng.normal(0, 1, (1, 32))
    mean *= size / np.linalg.norm(mean)
    state = cache.create(config, 1, CAPACITY, key=jax.random.key(0))
    state = replace(state, key_mean=jnp.asarray(mean[None, None], jnp.float32))
    index = np.concatenate([np.arange(b, b + 64) for b in (0, 64, 4096, 123_456, 2**20 - 64)])
    position = config.sinks + index
    keys = np.swapaxes(true_mean_at(config, mean, position), 0, 1)  # [T, 1, H]
    centred = pre_rope.center(
        jnp.asarray(keys, jnp.float32),
        state.key_mean[0, 0],
        state.phases,
        jnp.asarray(index, jnp.int32),
    )
    assert jnp.linalg.norm(centred) > 0, "nothing is left to be quantized"
    codec, heads = state.parts[0].codecs[0], jnp.arange(1)
    decoded = codec.unrotate(heads, codec.dequantize(codec.quantize(heads, centred, "xla")))
    if levels == "equal":
        decoded = jnp.zeros_like(decoded)
    q = rng.normal(0, 1, (1, 1, 4, 32)).astype(np.float32)
    rows = rows_of(state, 0)
    back = head_rotation.mean_products(
        state, rows, rows.members[0], jnp.asarray(q), jnp.asarray(position[None], jnp.int32)
    )
    got = q[0, 0].astype(float) @ np.asarray(decoded, float)[:, 0].T + np.asarray(back, float)[0, 0]
    want = q[0, 0].astype(float) @ keys[:, 0].T
    lengths = np.linalg.norm(q[0, 0], axis=-1)[:, None] * size
    assert np.abs(got - want).max() < (RESIDUE if levels == "equal" else 1e-4) * lengths.min()
    taken = mean_at(config, mean, position)[0]
    if levels == "equal":
        assert np.abs(got - q[0, 0].astype(float) @ taken.T).max() < 2.0**-12 * lengths.min()
