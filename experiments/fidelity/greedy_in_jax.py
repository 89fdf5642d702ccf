"""A program of its own beside `pytorch_greedy`: our own decoder given the tokens that torch chose.

python -m experiments.fidelity.greedy_in_jax model.gguf folder gpu
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from turboquant_jax import cache, models
from turboquant_jax.cache.presets import preset as preset_config
from turboquant_jax.models.generate import prefill
from turboquant_jax.models.past import COMPRESSED
from turboquant_jax.models.rope import inverse_frequencies


def main(path: str, folder: str, backend: str) -> None:
    """Logits of every file of the folder, `*.npz`, into `*.out.npz`."""
    if jax.default_backend() != backend:
        sys.exit(f"jax: got {jax.default_backend()!r}, expected {backend!r}, where torch ran")
    for file in sorted(Path(folder).glob("*.npz")):
        dtype = file.stem.rpartition("-")[2]
        with np.load(file) as held, jax.default_matmul_precision("highest"):
            checkpoint = models.load(path, dtype)
            logits = _logits(checkpoint, {name: held[name] for name in held.files}, dtype)
        np.savez(file.with_suffix(".out.npz"), logits=logits)


def _logits(checkpoint: models.Checkpoint, held: dict[str, np.ndarray], dtype: str) -> np.ndarray:
    sizes = checkpoint.config
    frequencies = tuple(inverse_frequencies(sizes).tolist())
    heads = sizes.num_layers, sizes.num_kv_heads, sizes.head_dim
    name: Any = str(held["preset"])
    config = replace(preset_config(name, *heads, frequencies), dtype=dtype)
    if repr(config) != str(held["config"]):
        raise ValueError(f"cache: got {config}, expected that of torch, {held['config']}")
    prompt, tokens = (jnp.asarray(held[name], jnp.int32) for name in ("prompt", "tokens"))
    length = jnp.full(1, prompt.shape[1], jnp.int32)
    capacity = prompt.shape[1] + len(tokens)
    state = cache.create(config, 1, capacity, key=jax.random.key(0))
    logits, state = prefill(checkpoint.model, prompt, length, state, COMPRESSED)
    more = _forced(checkpoint.model, tokens[:-1], length, state)
    return np.asarray(jnp.concatenate([logits, more]), np.float32)


@jax.jit
def _forced(model, tokens, position, state):
    """Logits [n, V] after each of n tokens, one a step."""

    def step(carry, token):
        position, state = carry
        state = COMPRESSED.begin(state, jnp.ones(1, jnp.int32), 1)
        hidden, state = model(token[None, None], position[:, None], state, COMPRESSED.attend)
        return (position + 1, COMPRESSED.commit(state)), model.logits(hidden)[0, 0]

    return lax.scan(step, (position, state), tokens)[1]


if __name__ == "__main__":
    main(*sys.argv[1:])
