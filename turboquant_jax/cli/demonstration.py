"""The demonstration: a real model, a real text, a cache that is really compressed.

Three parts, each a function from settings to numbers; `demo` prints them.
"""

import time
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from turboquant_jax.cache import CacheConfig
from turboquant_jax.cache.bytes import (
    bytes_per_compressed_token,
    exact_bytes_per_token,
    planned_bytes,
)
from turboquant_jax.cli.settings import Kind
from turboquant_jax.models import Checkpoint
from turboquant_jax.models.evaluate import compare, compressed_hidden, exact_hidden
from turboquant_jax.models.generate import NO_TOKEN, decode, pad_prompts, prefill
from turboquant_jax.models.options import Sampling
from turboquant_jax.models.past import COMPRESSED
from turboquant_jax.quantizers import bounds, quantizer
from turboquant_jax.quantizers import rotation as rotations


@dataclass(frozen=True)
class Answer:
    """One generation: its text, how many tokens, and how fast (compilation not counted)."""

    cache: str
    text: str
    tokens: int
    tokens_per_second: float


def full_precision(config: CacheConfig, capacity: int) -> CacheConfig:
    """The same cache with a window that never lets a token go: nothing is compressed."""
    return replace(config, window=capacity)


def answer(checkpoint: Checkpoint, kind: Kind, prompt: str, max_tokens: int, seed: int) -> Answer:
    """Generate greedily from a chat prompt; the first run compiles, the second is timed.

    Raises:
      ValueError: prompt and answer do not fit the model's context.
    """
    ids = checkpoint.tokenizer.encode_chat([{"role": "user", "content": prompt}])
    capacity = len(ids) + max_tokens
    if capacity > checkpoint.config.max_position:
        raise ValueError(
            f"the prompt has {len(ids)} tokens and the answer up to {max_tokens}, expected at most "
            f"{checkpoint.config.max_position} together"
        )
    tokens, lengths = (jnp.asarray(x) for x in pad_prompts([ids]))
    keys = jax.random.split(jax.random.key(seed), 1)

    def run():
        empty = kind.create(capacity, seed)
        logits, state = prefill(checkpoint.model, tokens, lengths, empty, COMPRESSED)
        jax.block_until_ready(logits)
        start = time.perf_counter()
        made = decode(
            checkpoint.model,
            logits,
            lengths,
            keys,
            state,
            COMPRESSED,
            max_tokens=max_tokens,
            sampling=Sampling(eos_ids=checkpoint.config.eos_ids),
        )
        made = jax.block_until_ready(made)
        return made, time.perf_counter() - start

    run()
    made, seconds = run()
    count = int(made.counts[0])
    if bool(made.state.overflow[0]):
        raise RuntimeError("the cache overflowed, although it was made for prompt and answer")
    out = np.asarray(made.tokens[0])
    text = checkpoint.tokenizer.decode([int(t) for t in out if t != NO_TOKEN])
    # the first token comes from the prefill; the loop makes the others
    return Answer(kind.name, text.strip(), count, max(count - 1, 1) / seconds)


def default_prompt() -> str:
    """A question whose answer stands at the start of a passage long enough to be compressed."""
    passage = default_text().split("\n\n")[0]
    return f"{passage}\n\nWhich book did Sir Walter Elliot take up for his own amusement?"


def default_text() -> str:
    """The opening of Jane Austen's Persuasion (1817), public domain, shipped with the package."""
    return resources.files("turboquant_jax").joinpath("texts/persuasion.txt").read_text("utf-8")


def read_text(path: Path | None) -> str:
    """A file, or the default text.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file that is not UTF-8 text.
    """
    if path is None:
        return default_text()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a text")
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: got {error}, expected UTF-8 text") from error


def text_tokens(checkpoint: Checkpoint, text: str, count: int) -> jax.Array:
    """The first `count` tokens of a text, [1, count].

    Raises:
      ValueError: a text of fewer than 2 tokens.
    """
    ids = checkpoint.tokenizer.encode(text)[:count]
    if len(ids) < 2:
        raise ValueError(f"the text: got {len(ids)} tokens, expected at least 2")
    return jnp.asarray([ids], jnp.int32)


class Fidelity:
    """Rows of the table over cache kinds; the full-precision pass over the text is made once."""

    def __init__(self, checkpoint: Checkpoint, tokens: jax.Array, seed: int):
        self.model, self.tokens, self.seed = checkpoint.model, tokens, seed
        self.exact = exact_hidden(self.model, tokens)

    def full(self, kind: Kind) -> dict:
        """The row of the full-precision cache, which stores 16 bits a number."""
        exact = full_precision(kind.config, self.tokens.shape[1])
        return self._row("full", "full", replace(kind, config=exact))

    def row(self, kind: Kind) -> dict:
        """Bytes and quality of one setting, everything counted and measured."""
        config = kind.config
        if config.allocation is not None:
            return self._row(*config.allocation.means, kind)
        return self._row(config.key.bits, config.value.bits, kind)

    def _row(self, key_bits, value_bits, kind: Kind) -> dict:
        count, config = self.tokens.shape[1], kind.config
        state = kind.create(1, self.seed)
        hidden = compressed_hidden(self.model, self.tokens, state)
        result = compare(self.model, self.tokens, self.exact, hidden)
        exact = exact_bytes_per_token(config)
        here = planned_bytes(config, 1, count).total / count
        deep = exact if key_bits == "full" else bytes_per_compressed_token(config)
        return {
            "bits_k": key_bits,
            "bits_v": value_bits,
            "bytes_per_token": here,
            "ratio": exact / here,
            "bytes_per_token_long": deep,
            "ratio_long": exact / deep,
            "perplexity": result.perplexity,
            "kl": float(result.kl.mean(dtype=np.float64)),
            "top1_agreement": float(result.agrees.mean(dtype=np.float64)),
        }


def theory_row(
    bits: int, dim: int, rotation: rotations.Kind, seed: int, vectors: int = 20_000
) -> dict:
    """Measured MSE on uniform unit vectors beside what theory says."""
    rotation_key, data_key = jax.random.split(jax.random.key(seed))
    spec = quantizer.create(
        rotation_key, dim, bits, rotation=rotation, scale="norm", scale_dtype=jnp.float32
    )
    x = jax.random.normal(data_key, (vectors, dim))
    x = x / jnp.linalg.norm(x, axis=1, keepdims=True)
    decoded = jax.jit(lambda q, x: quantizer.decode(q, quantizer.encode(q, x)))(spec, x)
    errors = np.sum(np.asarray(decoded - x, np.float64) ** 2, axis=1)
    return {
        "bits": bits,
        "measured": float(errors.mean()),
        "standard_error": float(errors.std() / np.sqrt(vectors)),
        "lloyd_max": bounds.lloyd_max_distortion(bits, dim),
        "upper_bound": bounds.mse_upper_bound(bits),
        "rate_distortion": bounds.sphere_distortion(bits, dim),
    }
