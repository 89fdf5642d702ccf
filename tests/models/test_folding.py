"""A rotation inside the weights changes nothing that can be seen, but where the cache rotates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from turboquant_jax import cache
from turboquant_jax.cache import CacheConfig, CodecConfig
from turboquant_jax.models.evaluate import compressed_hidden, exact_hidden
from turboquant_jax.models.folding import fold_value_rotation
from turboquant_jax.models.model import Llama, unstack
from turboquant_jax.quantizers import rotation


@pytest.fixture(scope="module")
def model(tiny_config):
    config = dataclasses.replace(tiny_config, head_dim=16)
    return jax.jit(lambda: Llama(config, nnx.Rngs(3), jnp.float32))()


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 60), 0, 97, jnp.int32)


def test_logits_are_the_same_in_full_precision(model, tokens, forward):
    pi = rotation.create("haar", jax.random.key(5), 16)
    want = forward(model, tokens)
    for decoder in (model, unstack(model)):
        folded = fold_value_rotation(decoder, pi)
        np.testing.assert_allclose(forward(folded, tokens), want, atol=2e-5)


def test_compression_is_that_of_a_cache_which_rotates(model, tokens):
    """The same rotation inside the codec and inside the weights: the same codes, the same text."""
    inside = CacheConfig(
        3, 2, 16, CodecConfig(3), CodecConfig(2), block=8, window=8, sinks=2, dtype="float32"
    )
    state = cache.create(inside, 2, 60, key=jax.random.key(2))
    want = compressed_hidden(model, tokens, state)
    folded = fold_value_rotation(model, state.parts[0].codecs[1].groups[0].rotation)
    outside = dataclasses.replace(inside, value=CodecConfig(2, rotation="identity"))
    other = cache.create(outside, 1, 1, key=jax.random.key(2))
    got = compressed_hidden(folded, tokens, other)
    plain = exact_hidden(model, tokens)

    def distance(x, y):
        return float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y))

    # a coordinate that lies on a threshold may fall to either side
    assert distance(got, want) < 0.05 * distance(want, plain)


def test_a_rotation_of_another_dimension_is_refused(model):
    with pytest.raises(ValueError, match="dimension 32, expected head_dim 16"):
        fold_value_rotation(model, rotation.create("haar", jax.random.key(0), 32))
