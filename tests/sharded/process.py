"""One of two processes with two devices each: tokens on the mesh of all four, and a saved cache.

Run with a folder, in the environment of `turboquant_jax.hosts`. Not a test: `test_hosts` runs it.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from turboquant_jax import cache, hosts
from turboquant_jax.cache import CacheConfig, sharding
from turboquant_jax.cache.mesh import make_mesh
from turboquant_jax.models import LlamaConfig
from turboquant_jax.models import sharding as model_sharding
from turboquant_jax.models.generate import decode, prefill
from turboquant_jax.models.model import random_model
from turboquant_jax.models.past import COMPRESSED, on_mesh

LLAMA = LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=4,
    num_kv_heads=2, head_dim=16, max_position=64, rope_theta=1e4, rms_norm_eps=1e-5,
    tie_embeddings=False,
)  # fmt: skip
CONFIG = CacheConfig(1, 2, 16, block=8, window=8, dtype="float32")
SIZES = 2, 64


def generated(mesh, state):
    """Tokens, and the cache after them."""
    if mesh is None:
        model, past = random_model(LLAMA, 0, jnp.float32, stacked=False), COMPRESSED
    else:
        model, past = model_sharding.random_model(LLAMA, 0, mesh, jnp.float32), on_mesh(mesh)
    tokens = np.random.default_rng(0).integers(0, 96, (2, 40), np.int32)
    lengths = np.array([40, 31], np.int32)
    logits, state = prefill(model, tokens, lengths, state, past)
    keys = jax.random.split(jax.random.key(0), 2)
    made = decode(model, logits, lengths, keys, state, past, max_tokens=6)
    return np.asarray(made.tokens), made.state


def main(folder: Path) -> None:
    """Compare the mesh of both processes with one device, then save and restore."""
    hosts.start(timeout=60)
    assert (jax.process_count(), jax.device_count()) == (2, 4)
    mesh, key = make_mesh(tensor=2, context=2), jax.random.key(0)
    expected, _ = generated(None, cache.create(CONFIG, *SIZES, key=key))
    found, state = generated(mesh, sharding.create(mesh, CONFIG, *SIZES, key=key))
    np.testing.assert_array_equal(found, expected)
    sharding.save(mesh, state, folder / "held", model="ours")
    assert len(list((folder / "held").iterdir())) == 4
    back = sharding.restore(mesh, state, folder / "held", model="ours")
    for new, old in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        for mine, its in zip(new.addressable_shards, old.addressable_shards, strict=True):
            np.testing.assert_array_equal(mine.data, its.data)
    print(f"process {jax.process_index()}: {expected.tolist()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
