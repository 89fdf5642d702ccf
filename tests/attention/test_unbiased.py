"""Keys of the code "prod" through the cache's attention: slope 1, and the variance of the theory.

Scores are read off the outputs of attention. Values are decoded from their bytes, so that an output
tells the share of every token; the new token's key is 0, so that shares are scores.
"""

from dataclasses import replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from pallas_kernels.primitives.triton import interpreted
from tests.layout import CODEC, QUICK, decoded_page
from tests.marks import GPU
from turboquant_jax import cache
from turboquant_jax.attention import Scores, attend
from turboquant_jax.quantizers import bounds

DIM, TOKENS, HEADS, GROUP, BATCH = 64, 32, 2, 8, 4
DRAWS = 128  # of rotation and sketch
SCALE = 0.03  # shares of about the same size: of some that are small the kernel knows little
KINDS = ("gaussian", "orthogonal")
BITS = 2


def config_of(kind):
    return cache.CacheConfig(
        1, HEADS, DIM, CODEC(BITS, "haar", code="prod", scale="norm", sketch=kind),
        CODEC(8, "identity"), block=TOKENS, window=0, sinks=0, dtype="float32",
    )  # fmt: skip


def vectors():
    """Queries [B, K, G, H], half of them near a key; keys with an offset, and values [B, T, K, H].

    Over independent pairs alone any slope has an error of zero in the mean.
    """
    rng = np.random.default_rng(0)
    keys, values = rng.normal(0, 1, (2, BATCH, TOKENS, HEADS, DIM))
    queries = rng.normal(0, 1, (BATCH, HEADS, GROUP, DIM))
    near = np.moveaxis(keys[:, : GROUP // 2], 1, 2)
    queries[:, :, : GROUP // 2] = 0.5 * queries[:, :, : GROUP // 2] + near
    return queries, keys + 3 * rng.normal(0, 1, (HEADS, DIM)), values, rng.normal(0, 1, DIM)


def too_small(states):
    """The defect seen in the field: rows N(0, 1/d) with the factor of rows N(0, 1)."""
    (part,) = states.parts
    key, value = part.codecs
    sketch = replace(key.sketch, matrix=key.sketch.matrix / np.sqrt(DIM))
    return replace(states, parts=(replace(part, codecs=(replace(key, sketch=sketch), value)),))


@lru_cache
def filled(kind):
    """A cache of each draw, with the same tokens in it."""

    def fill(k, v, key):
        state = cache.create(config_of(kind), BATCH, TOKENS, key=key)
        return cache.append(state, k[None], v[None], implementation="xla")

    _, k, v, _ = vectors()
    fill = partial(fill, *(jnp.asarray(x, jnp.float32) for x in (k, v)))
    keys = jax.random.split(jax.random.key(1), DRAWS)
    return jax.jit(partial(jax.lax.map, fill), compiler_options=QUICK)(keys)


def outputs(states, implementation):
    """Of attention over each cache [draws, B, N, H]."""
    q, _, _, new = (jnp.asarray(x, jnp.float32) for x in vectors())
    q = q.reshape(BATCH, 1, -1, DIM)
    key = jnp.zeros((BATCH, 1, HEADS, DIM))
    value = jnp.broadcast_to(new, key.shape)
    options = dict(scores=Scores(SCALE), implementation=implementation)
    run = partial(jax.lax.map, lambda state: attend(state, 0, q, key, value, **options)[:, 0])
    return np.asarray(jax.jit(run, compiler_options=QUICK)(states), np.float64)


def measure(states, implementation="xla"):
    """Two numbers for each cache, a draw of rotation and sketch, over scores of centred keys:

    the slope through the origin of those in the cache on the true ones, and DIM times their squared
    error for queries that are independent of the keys, of unit vectors.
    """
    q, k, _, new = vectors()
    mean = k.mean(axis=1, keepdims=True)  # of the first block, which centring took
    centred = np.moveaxis(k - mean, 1, 2)  # [B, K, T, H]
    truth = np.einsum("bkgh,bkth->bkgt", q, centred)
    sizes = np.linalg.norm(q, axis=-1)[..., None] * np.linalg.norm(centred, axis=-1)[:, :, None]
    one = jax.tree.map(lambda x: x[0], states)  # values are not rotated: the same in all
    held = np.stack([decoded_page(one, 0, int(page), True) for page in one.table.page_table[:, 0]])
    held = np.append(held, np.broadcast_to(new, (BATCH, HEADS, 1, DIM)), axis=2)
    shares = outputs(states, implementation).reshape(-1, *q.shape) @ np.linalg.pinv(held)
    estimate = np.log(shares[..., :-1] / shares[..., -1:]) / SCALE
    estimate -= np.einsum("bkgh,bkh->bkg", q, mean[:, 0])[..., None]
    slope = np.sum(estimate * truth, axis=(1, 2, 3, 4)) / np.sum(truth**2)
    error = ((estimate - truth) / sizes)[:, :, :, GROUP // 2 :]
    return slope, DIM * np.mean(error**2, axis=(1, 2, 3, 4))


def assert_slope(per_draw, expected):
    """The 99 % confidence interval over draws holds `expected` and is narrower than 0.008."""
    half = stats.t.ppf(0.995, len(per_draw) - 1) * stats.sem(per_draw)
    assert 2 * half < 0.008
    assert abs(np.mean(per_draw) - expected) < half


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_the_cache_have_slope_one_and_the_exact_variance(kind):
    slope, variance = measure(filled(kind))
    print(kind, np.mean(slope), stats.sem(slope), np.mean(variance), stats.sem(variance))
    assert_slope(slope, 1.0)
    exact = bounds.prod_variance(BITS, DIM, kind)
    assert stats.sem(variance) < 0.006 * exact
    assert np.mean(variance) == pytest.approx(exact, rel=0.02)


def test_a_sketch_that_is_too_small_is_noticed():
    slope, _ = measure(too_small(filled("orthogonal")))
    with pytest.raises(AssertionError):
        assert_slope(slope, 1.0)
    # and by as much as theory says
    assert_slope(slope, 1 - bounds.lloyd_max_distortion(BITS - 1, DIM) * (1 - DIM**-0.5))


@pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=GPU)])
def test_the_fused_kernel_has_the_slopes_of_the_definition(interpret):
    """Draw by draw: queries and shares are 15-bit integers in the kernel."""
    states = jax.tree.map(lambda x: x[: 3 if interpret else DRAWS], filled("gaussian"))
    want = measure(states)
    with interpreted(interpret):
        got = measure(states, "pallas")
    print(want, got)
    np.testing.assert_allclose(got, want, rtol=1e-3)
