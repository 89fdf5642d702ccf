"""The same greedy generation by the kernel and by its definition, and where they part, why."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness.experiment import Row
from turboquant_jax import cache
from turboquant_jax.cache import CacheConfig, CodecConfig
from turboquant_jax.cli.demonstration import default_text
from turboquant_jax.implementation import Implementation
from turboquant_jax.models import Checkpoint, load
from turboquant_jax.models.generate import decode, prefill
from turboquant_jax.models.past import compressed

_PROMPT = 512  # tokens: blocks are compressed before the first step


def compare(path: str, count: int, dtype: str, bits: int = 4) -> Row:
    """Generate `count` tokens twice in `dtype`; where they differ first, the logits of both.

    `gap` is how far the best token lies before the second in the logits of each, `logit_difference`
    how far the two implementations are apart at most: a gap of that order is a near-tie.
    """
    checkpoint = load(path or None, dtype)
    texts = _of_both(lambda name: _generate(checkpoint, name, count, bits))
    row: Row = {"dtype": dtype, "bits_k": bits, "bits_v": bits}
    row |= {"context": _PROMPT, "tokens": count}
    differs = np.flatnonzero(texts[0] != texts[1])
    if not differs.size:
        return row | {"tokens_equal": count}
    first = int(differs[0])
    row |= {"tokens_equal": first}
    seen = texts[0][:first]  # by both, before they parted
    logits = _of_both(lambda name: _logits(checkpoint, name, seen, bits))
    for name, values in zip(("xla", "pallas"), logits, strict=True):
        second, best = np.sort(values)[-2:]
        row[f"gap_{name}"] = float(best - second)
    return row | {"logit_difference": float(np.abs(logits[0] - logits[1]).max())}


def _of_both(call: Callable[[Implementation | None], np.ndarray]) -> list[np.ndarray]:
    """What the definition says and what the kernel says, both compiled at a time."""

    def run(implementation: Implementation | None) -> np.ndarray:
        # float32 is to mean float32: a GPU would multiply with ten bits of mantissa
        with jax.default_matmul_precision("highest"):
            return call(implementation)

    kernel: Implementation | None = "pallas" if jax.default_backend() == "gpu" else None
    with ThreadPoolExecutor() as pool:
        return list(pool.map(run, ("xla", kernel)))


def _prefilled(checkpoint: Checkpoint, implementation, capacity: int, bits: int):
    model = checkpoint.config
    config = CacheConfig(
        model.num_layers, model.num_kv_heads, model.head_dim, CodecConfig(bits), CodecConfig(bits)
    )
    prompt = jnp.asarray([checkpoint.tokenizer.encode(default_text())[:_PROMPT]], jnp.int32)
    read = compressed("xla")  # the prompt, so that both begin alike
    state = cache.create(config, 1, capacity, key=jax.random.key(0))
    past, lengths = compressed(implementation), jnp.full(1, _PROMPT, jnp.int32)
    decoder = checkpoint.model  # stacked: four compilations, and speed is no question here
    return decoder, past, lengths, *prefill(decoder, prompt, lengths, state, read)


def _generate(checkpoint: Checkpoint, implementation, count: int, bits: int) -> np.ndarray:
    decoder, past, lengths, logits, state = _prefilled(
        checkpoint, implementation, _PROMPT + count, bits
    )
    keys = jax.random.split(jax.random.key(0), 1)
    made = decode(decoder, logits, lengths, keys, state, past, max_tokens=count)
    return np.asarray(made.tokens[0])


def _logits(checkpoint: Checkpoint, implementation, tokens: np.ndarray, bits: int) -> np.ndarray:
    """After the prompt and these tokens, each of which was one step."""
    decoder, past, lengths, logits, state = _prefilled(
        checkpoint, implementation, _PROMPT + len(tokens) + 1, bits
    )
    if len(tokens):
        more, one = jnp.asarray(tokens[None]), jnp.full(1, len(tokens), jnp.int32)
        logits, _ = prefill(decoder, more, one, state, past, start=lengths, chunk=1)
    return np.asarray(logits[0], np.float64)
