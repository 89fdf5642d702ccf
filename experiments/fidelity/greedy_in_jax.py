"""A program of its own beside `pytorch_greedy`: our own decoder given the tokens that torch chose.

python -m experiments.fidelity.greedy_in_jax model.gguf lossless-float32.npz gpu 256 512 $$
"""

import functools
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from turboquant_jax import cache, models
from turboquant_jax.cache.presets import preset as preset_config
from turboquant_jax.models import sensitivity
from turboquant_jax.models.generate import compiled_prefill
from turboquant_jax.models.past import COMPRESSED
from turboquant_jax.models.rope import inverse_frequencies


def main(path: str, file: str, backend: str, tokens: str, prompt: str, parent: str) -> None:
    """Logits of what comes as a file, `preset-dtype.npz`, into another, `.out.npz` for `.npz`.

    They are compiled meanwhile, for so many tokens behind a prompt of so many; `parent` is torch's
    process, without which there is nothing to wait for.
    """
    if jax.default_backend() != backend:
        sys.exit(f"jax: got {jax.default_backend()!r}, expected {backend!r}, where torch ran")
    os.nice(10)  # torch launches kernels meanwhile
    place = Path(file)
    name, _, dtype = place.stem.rpartition("-")
    with jax.default_matmul_precision("highest"):
        checkpoint = models.load(path, dtype)
        config = _config(checkpoint, name, dtype)
        shapes = (
            jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, int(prompt)), (int(tokens),))
        )
        # run once: with kernels tried out for its products, compiling would take minutes
        logits = sensitivity.compiled(functools.partial(_logits, config))
        compiled = logits.lower(checkpoint.model, *shapes).compile()
    print(f"{place.stem}: compiled in {time.process_time():.0f} s of a core", file=sys.stderr)
    while not place.exists():
        if os.getppid() != int(parent):
            sys.exit("torch is gone")
        time.sleep(0.1)
    with np.load(place) as held:
        if repr(config) != str(held["config"]):
            raise ValueError(f"cache: got {config}, expected that of torch, {held['config']}")
        given = (held[name].astype(np.int32) for name in ("prompt", "tokens"))
        found = compiled(checkpoint.model, *given)
    np.savez(place.with_suffix(".out.npz"), logits=np.asarray(found, np.float32))


def _config(checkpoint: models.Checkpoint, name: Any, dtype: str) -> cache.CacheConfig:
    sizes = checkpoint.config
    frequencies = tuple(inverse_frequencies(sizes).tolist())
    heads = sizes.num_layers, sizes.num_kv_heads, sizes.head_dim
    return replace(preset_config(name, *heads, frequencies), dtype=dtype)


def _logits(config: cache.CacheConfig, model: Any, prompt: jax.Array, tokens: jax.Array):
    """[n, V] behind a prompt [1, T] and each of n tokens but the last, one a step."""
    length = jnp.full(1, prompt.shape[1], jnp.int32)
    capacity = prompt.shape[1] + len(tokens)
    state = cache.create(config, 1, capacity, key=jax.random.key(0))
    logits, state = compiled_prefill(model, prompt, length, state, COMPRESSED, empty=True)

    def step(carry, token):
        position, state = carry
        state = COMPRESSED.begin(state, jnp.ones(1, jnp.int32), 1)
        hidden, state = model(token[None, None], position[:, None], state, COMPRESSED.attend)
        return (position + 1, COMPRESSED.commit(state)), model.logits(hidden)[0, 0]

    more = lax.scan(step, (length, state), tokens[:-1])[1]
    return jnp.concatenate([logits, more])


if __name__ == "__main__":
    main(*sys.argv[1:])
