"""Sampling against the definitions of its filters and against the distribution it must have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from turboquant_jax.models.options import GREEDY, Sampling
from turboquant_jax.models.sampling import sample

VOCAB = 24

draw = jax.jit(sample, static_argnums=2)


def logits():
    return 2 * jax.random.normal(jax.random.key(0), (VOCAB,))


def probabilities(sampling):
    """The definition, in float64: temperature, then the k largest, then the nucleus of these."""
    scaled = np.asarray(logits(), np.float64) / sampling.temperature
    order = np.argsort(-scaled)[: sampling.top_k]
    p = np.exp(scaled[order] - scaled.max())
    p /= p.sum()
    if sampling.top_p is not None:
        # the shortest prefix that reaches top_p
        p = p[: int(np.searchsorted(np.cumsum(p), sampling.top_p)) + 1]
    full = np.zeros(VOCAB)
    full[order[: len(p)]] = p / p.sum()
    return full


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.6),
        Sampling(temperature=1.5, top_k=5),
        Sampling(temperature=1.0, top_p=0.8),
        Sampling(temperature=2.0, top_k=9, top_p=0.7),
        Sampling(temperature=1.0, top_k=1000),
    ],
)
def test_distribution(sampling):
    """Chi-square over 40,000 draws: rejects a right sampler once in 10,000, the seed is fixed."""
    draws = 40_000
    keys = jax.random.split(jax.random.key(1), draws)
    rows = jnp.broadcast_to(logits()[None], (draws, VOCAB))
    tokens = draw(rows, keys, sampling)
    assert tokens.dtype == jnp.int32
    counts = np.bincount(np.asarray(tokens), minlength=VOCAB)
    p = probabilities(sampling)
    assert counts[p == 0].sum() == 0
    common = p * draws >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(p[common], p[~common].sum()) * draws
    used = expected > 0
    assert stats.chisquare(observed[used], expected[used]).pvalue > 1e-4


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
    """Of 0.5, 0.25, 0.125, 0.125: two tokens reach 0.75 exactly, three are needed beyond."""
    rows = jnp.log(jnp.array([0.125, 0.5, 0.125, 0.25]))[None].repeat(2000, axis=0)
    keys = jax.random.split(jax.random.key(2), 2000)

    def drawn(top_p):
        return set(np.unique(draw(rows, keys, Sampling(1.0, top_p=top_p))).tolist())

    assert drawn(0.4) == {1}
    assert drawn(0.74) == {1, 3}
    assert drawn(0.76) == {0, 1, 3}  # of equal ones the lower id
    assert drawn(1.0) == {0, 1, 2, 3}


def test_a_nucleus_that_reaches_top_p_exactly_is_large_enough():
    """Of eight equal tokens, whose probability has no rounding, k reach k / 8."""
    keys = jax.random.split(jax.random.key(7), 1000)
    for count in (1, 3, 6):
        drawn = draw(jnp.zeros((1000, 8)), keys, Sampling(1.0, top_p=count / 8))
        assert set(np.unique(drawn).tolist()) == set(range(count))


def test_greedy_and_top_1_take_the_largest():
    rows = jax.random.normal(jax.random.key(3), (50, VOCAB))
    keys = jax.random.split(jax.random.key(4), 50)
    expected = np.argmax(rows, axis=-1)
    np.testing.assert_array_equal(draw(rows, keys, GREEDY), expected)
    np.testing.assert_array_equal(draw(rows, keys, Sampling(1.0, top_k=1)), expected)
    np.testing.assert_array_equal(draw(rows, keys, Sampling(1.0, top_p=1e-6)), expected)


def test_a_row_depends_on_its_own_key_only():
    rows = jax.random.normal(jax.random.key(5), (8, VOCAB))
    keys = jax.random.split(jax.random.key(6), 8)
    sampling = Sampling(1.0, top_k=10, top_p=0.9)
    whole = draw(rows, keys, sampling)
    one_by_one = [draw(rows[i : i + 1], keys[i : i + 1], sampling)[0] for i in range(8)]
    np.testing.assert_array_equal(whole, jnp.stack(one_by_one))


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-38, 1e-40, 1e-300])
@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.9}])
@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_a_tiny_temperature_takes_the_largest(temperature, filters, scale):
    """Whatever the logits' size: the limit of the distribution, not an infinity."""
    rows = scale * jax.random.normal(jax.random.key(8), (20, VOCAB))
    keys = jax.random.split(jax.random.key(9), 20)
    expected = np.argmax(rows, axis=-1)
    assert len(set(expected.tolist())) > 5
    got = draw(rows, keys, Sampling(temperature, **filters))
    np.testing.assert_array_equal(got, expected)


def test_equal_largest_logits_stay_equally_likely_at_a_tiny_temperature():
    rows = jnp.array([0.0, 3.0, 1.0, 3.0])[None].repeat(400, axis=0)
    got = np.asarray(draw(rows, jax.random.split(jax.random.key(10), 400), Sampling(1e-39)))
    assert set(got.tolist()) == {1, 3}
    assert stats.binomtest(int((got == 1).sum()), 400).pvalue > 1e-3


def test_numbers_of_numpy_are_numbers():
    given = Sampling(np.float32(0.5), np.int64(3), np.float64(0.25))
    assert given == Sampling(0.5, 3, 0.25) and hash(given) == hash(Sampling(0.5, 3, 0.25))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature: got -0.1"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"temperature": "1"}, "temperature: got '1'"),
        ({"temperature": 1.0, "top_k": 0}, "top_k: got 0"),
        ({"temperature": 1.0, "top_k": 2.5}, "top_k: got 2.5, expected an integer"),
        ({"temperature": 1.0, "top_k": True}, "top_k: got True, expected an integer"),
        ({"temperature": 1.0, "top_p": "0.5"}, "top_p: got '0.5'"),
        ({"top_k": 5}, "top_k: got 5 with a temperature of 0"),
        ({"temperature": 0, "top_p": 0.9}, "top_p: got 0.9 with a temperature of 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p: got 0.0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p: got 1.1"),
    ],
)
def test_meaningless_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
