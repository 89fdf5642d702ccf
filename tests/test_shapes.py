"""That shapes are checked while tests run: a wrong axis fails here which JAX would broadcast."""

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from pallas_kernels.encode.call import rotated_means
from pallas_kernels.primitives.rotation import RotationOperand
from turboquant_jax import cache
from turboquant_jax.attention.projection import apply_rope
from turboquant_jax.cache import CacheConfig


def test_an_axis_that_is_not_the_other_ones_is_refused():
    x, angle = jnp.ones((2, 3, 4, 8)), jnp.ones((2, 3, 4))
    assert apply_rope(x, angle, angle).shape == x.shape
    with pytest.raises(TypeCheckError, match="apply_rope"):
        apply_rope(x, angle[:1], angle)


def test_the_calls_of_the_kernels_are_checked():
    group = type("Group", (), {"rotation": RotationOperand(jnp.ones((1, 1, 8, 8)))})
    assert rotated_means(jnp.ones((2, 3, 8)), (group,)).shape == (2, 3, 8)
    with pytest.raises(TypeCheckError, match="rotated_means"):
        rotated_means(jnp.ones((2, 3, 16)), (group,))


def test_a_pytree_is_checked_where_the_library_makes_it_and_not_where_jax_does():
    config = CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, window=0, block=8)
    made = cache.create(config, 2, 32, key=jax.random.key(0))
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), made)
    assert stacked.tables[0].lengths.shape == (2, 2)
    with pytest.raises(TypeCheckError, match="Table"):
        made.with_lengths(jnp.zeros((2, 1), jnp.int32))
