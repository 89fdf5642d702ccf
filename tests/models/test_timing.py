"""What a step reads, against what is allocated; filled pasts, against those that were prefilled."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from turboquant_jax.cache import CacheConfig, CodecConfig
from turboquant_jax.cache.bytes import planned_bytes
from turboquant_jax.models import PRESETS, dense, timing
from turboquant_jax.models.dense import DENSE
from turboquant_jax.models.model import unstack

CONFIG = CacheConfig(2, 2, 16, CodecConfig(3), CodecConfig(2), block=8, window=8, sinks=3)


def test_a_step_reads_what_is_stored():
    sizes = PRESETS["llama-3-8b"]
    for bits in (4, 2):
        codec = CodecConfig(bits)
        config = CacheConfig(sizes.num_layers, sizes.num_kv_heads, sizes.head_dim, codec, codec)
        tokens = 4 + 128 + 64 * 500  # the window as short as it can be, one slot of a block unused
        held, read = planned_bytes(config, 1, tokens), timing.past_bytes(config, tokens, True)
        unused = 64 * 2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim * 2
        rest = held.key_mean + held.codecs + 4 * 2 + 1
        assert read == pytest.approx(held.total - unused - rest, abs=1)
        assert timing.past_bytes(config, tokens, False) == tokens * 131_072


def test_weights_of_a_step_leave_out_an_embedding_that_is_only_looked_up(tiny_config, tiny):
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(tiny))
    assert timing.weight_bytes(tiny) == whole - 97 * 32 * 4


def test_filled_pasts_hold_their_tokens(tiny_config):
    state = timing.filled_cache(CONFIG, 2, 61, 70)
    np.testing.assert_array_equal(state.lengths, [61, 61])
    assert (
        len(np.unique(state.parts[0].pool.keys[0][0])) > 100
        and jnp.isfinite(state.window.keys).all()
    )
    key = CodecConfig(3, code="prod")
    sketched = timing.filled_cache(replace(CONFIG, key=key), 1, 61, 70).parts[0].pool.sketches
    assert len(np.unique(sketched.signs)) > 20 and np.all(sketched.norms == 1)
    full = timing.filled_dense(tiny_config, 2, 61, 70)
    np.testing.assert_array_equal(full.lengths, [61, 61])
    assert full.nbytes == dense.create(tiny_config, 2, 70).nbytes
    assert float(jnp.std(full.keys[1].astype(jnp.float32))) > 0.5


def test_a_past_without_room_is_refused(tiny_config, tiny):
    with pytest.raises(ValueError, match="without room for 3 more tokens"):
        timing.time_decode(
            unstack(tiny), lambda: timing.filled_dense(tiny_config, 1, 20, 22), DENSE, steps=3
        )
