"""The dense past against the test's own float32 attention, and against the cache that keeps all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from turboquant_jax import cache
from turboquant_jax.cache import CacheConfig, CodecConfig
from turboquant_jax.models import dense
from turboquant_jax.models.decoding import generate
from turboquant_jax.models.dense import DENSE
from turboquant_jax.models.generate import pad_prompts, prefill
from turboquant_jax.models.model import unstack
from turboquant_jax.models.past import COMPRESSED

PROMPTS = [[5, 9, 33, 2, 71, 8, 8], [4], [90, 11, 12, 13]]
SIZE = 24


@pytest.fixture(scope="module")
def unstacked(tiny):
    return unstack(tiny)


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_logits_equal_plain_attention_in_chunks_of_any_size(tiny, unstacked, past, empty, chunk):
    tokens, lengths = map(jnp.asarray, pad_prompts(PROMPTS))
    want, plain = prefill(tiny, tokens, lengths, empty(tiny.config, 3, SIZE), past)
    state = dense.create(tiny.config, 3, SIZE, jnp.float32)
    got, state = prefill(unstacked, tokens, lengths, state, DENSE, chunk=chunk)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_array_equal(state.lengths, lengths)
    np.testing.assert_allclose(jnp.stack(state.keys), plain.keys, atol=1e-5)


def test_generation_equals_the_cache_that_never_lets_go(tiny, unstacked):
    config = tiny.config
    shape, codec = (config.num_layers, config.num_kv_heads, config.head_dim), CodecConfig(4, "haar")
    full = CacheConfig(*shape, codec, codec, window=SIZE, dtype="float32")
    tokens, lengths = map(jnp.asarray, pad_prompts(PROMPTS))
    keys = jax.random.split(jax.random.key(0), 3)
    made = [
        generate(model, tokens, lengths, keys, state, past, max_tokens=12)
        for model, state, past in (
            (unstacked, dense.create(config, 3, SIZE, jnp.float32), DENSE),
            (tiny, cache.create(full, 3, SIZE, key=jax.random.key(1)), COMPRESSED),
        )
    ]
    np.testing.assert_array_equal(made[0].tokens, made[1].tokens)
    np.testing.assert_array_equal(made[0].state.lengths, made[1].state.lengths)


def test_what_does_not_fit_is_left_out_and_said(tiny_config):
    state = dense.create(tiny_config, 2, 4)
    state = dense.commit(dense.begin(state, jnp.array([3, 4], jnp.int32), 4))
    state = dense.begin(state, jnp.array([1, 1], jnp.int32), 1)
    np.testing.assert_array_equal(state.overflow, [False, True])
    np.testing.assert_array_equal(dense.commit(state).lengths, [4, 4])


def test_wrong_calls_are_refused(tiny, tiny_config):
    tokens, lengths = map(jnp.asarray, pad_prompts(PROMPTS))
    with pytest.raises(ValueError, match="got a stacked decoder"):
        prefill(tiny, tokens, lengths, dense.create(tiny_config, 3, SIZE), DENSE)
    with pytest.raises(ValueError, match="must be positive, got 0 and 4"):
        dense.create(tiny_config, 0, 4)
