"""Greedy answers through a compressed cache: how long they stay those of full precision.

The model answers questions over documents, programming problems and sums (the prompts of
`questions`) greedily in full precision, with 128 tokens or up to the end of its answer. A
compressed cache gives the same answer up to the first token whose choice differs when that answer
is teacher-forced: its own greedy answer begins with so many tokens of it. The row of full precision
is the same answer teacher-forced: where it differs, two choices are so close that the order of sums
decides.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from experiments.harness import prepared
from experiments.harness.experiment import QUESTION, Claim, Row, Track, distinct, option, where
from experiments.harness.plotting import Figure, label, panels
from experiments.tasks.answers import FULL, Answers, Asked, Asking, ask_all
from experiments.tasks.prompts import Prompts, load, pack, random_prompts
from turboquant_jax import cache
from turboquant_jax.cache import CacheConfig
from turboquant_jax.models import Llama
from turboquant_jax.models.decoding import generate
from turboquant_jax.models.model import Layer, unstack
from turboquant_jax.models.options import Sampling
from turboquant_jax.models.past import compressed

NEEDS = prepared.NEEDS
KEYS = ("model", "task", "context", "preset")
_ROWS = 16  # of a batch that is answered
_TILE = 128  # tokens, which the forced pass takes whole


@dataclass(frozen=True)
class Config(Asking):
    """What to run."""

    tasks: tuple[str, ...] = option(("squad", "human_eval", "gsm8k"), "which questions")
    answer: int = option(128, "most tokens of an answer")


SMOKE = Config("tiny", 1, tasks=("squad",), answer=20)


def run(config: Config, track: Track) -> list[Row]:
    """Every task in full precision and with every setting."""
    model = prepared.model(config.model)
    model = unstack(model) if isinstance(model.layers, Layer) else model
    cases = []
    for task in config.tasks:
        made = answered(model, _questions(config, task), config.answer)
        cases.append((task, {"task": task, "context": made.tokens.shape[1]}, made))
    return ask_all("greedy", config, cases, _rows, track, ("tasks",))


def _questions(config: Config, task: str) -> Prompts:
    if config.model == "tiny":
        return random_prompts(4, 160)
    return load(f"questions/{task}", config.model)


def answered(model: Llama, questions: Prompts, most: int) -> Prompts:
    """The same questions with the model's own greedy answers in full precision."""
    with jax.default_matmul_precision("highest"):
        found = []
        for first in range(0, len(questions.tokens), _ROWS):
            rows = np.arange(first, first + _ROWS) % len(questions.tokens)
            asked = questions.tokens[rows], questions.start[rows]
            found += list(_greedy(model, *asked, most))[: len(questions.tokens) - first]
    pairs = [
        (tokens[:start].tolist(), answer)
        for tokens, start, answer in zip(questions.tokens, questions.start, found, strict=True)
    ]
    longest = max(len(before) + len(answer) for before, answer in pairs)
    return pack(pairs, -(-longest // _TILE) * _TILE)


def _greedy(
    model: Llama, tokens: Int[np.ndarray, "B T"], lengths: Int[np.ndarray, " B"], most: int
) -> Iterator[list[int]]:
    """The answers to the first `lengths` tokens of each row."""
    sizes, capacity = model.config, tokens.shape[1] + most
    config = CacheConfig(
        *(sizes.num_layers, sizes.num_kv_heads, sizes.head_dim),
        window=capacity, sinks=0, dtype="float32",
    )  # fmt: skip
    state = cache.create(config, len(tokens), capacity, key=jax.random.key(0))  # never compresses
    made = generate(
        model,
        jnp.asarray(tokens),
        jnp.asarray(lengths, jnp.int32),
        jax.random.split(jax.random.key(0), len(tokens)),
        state,
        compressed("xla"),
        max_tokens=most,
        sampling=Sampling(eos_ids=tuple(model.config.eos_ids)),
    )
    for row, count in zip(np.asarray(made.tokens), np.asarray(made.counts), strict=True):
        yield row[:count].tolist()


def prefix(hit: Bool[np.ndarray, "n P"], valid: Bool[np.ndarray, "n P"]) -> Int[np.ndarray, " n"]:
    """Tokens before the first that is there and is not hit."""
    missed = np.where(valid, ~hit, True)
    return np.where(missed.any(axis=1), missed.argmax(axis=1), valid.shape[1])


def _rows(asked: Asked, made: Answers, columns: Row) -> Iterator[Row]:
    equal, count = prefix(made.hit, made.valid), made.valid.sum(axis=1)
    kl = np.where(made.valid, made.kl, 0).sum(axis=1) / count
    yield {
        **columns,
        "answers": len(count),
        "tokens": float(count.mean()),
        "whole": int((equal == count).sum()),
        "prefix": float(equal.mean()),
        "prefix_se": float(equal.std(ddof=1) / len(equal) ** 0.5),
        "prefix_median": float(np.median(equal)),
        "kl": float(kl.mean()),
        "kl_se": float(kl.std(ddof=1) / len(kl) ** 0.5),
    }


def claims(rows: Sequence[Row]) -> list[Claim]:
    """How much of the answers of full precision each setting gives."""
    made = []
    for preset in distinct(rows, "preset"):
        found = where(rows, preset=preset)
        whole, count = (sum(row[column] for row in found) for column in ("whole", "answers"))
        start, tokens = (
            sum(row[column] * row["answers"] for row in found) / count
            for column in ("prefix", "tokens")
        )
        who = "the same arithmetic in another order" if preset == FULL else preset
        made.append(
            Claim(
                QUESTION,
                f"{who} gives every greedy answer of full precision, whole",
                f"{whole} of {count}; on average the first {start:.1f} of {tokens:.1f} tokens",
                "holds" if whole == count else "does not hold",
                topic="a compressed cache gives every greedy answer of full precision, whole",
                short=f"{whole} of {count} ({who})",
            )
        )
    return made


def figure(rows: Sequence[Row]) -> Figure:
    """The equal beginning of answers, beside their length."""
    made, axes = panels(1, 1, 6.5, 3.5)
    (axis,) = axes.ravel()
    tasks, shown = distinct(rows, "task"), distinct(rows, "preset")
    for i, preset in enumerate(shown):
        found = where(rows, preset=preset)
        at = [tasks.index(row["task"]) + 0.08 * (i - len(shown) / 2) for row in found]
        mean, error = ([row[c] for row in found] for c in ("prefix", "prefix_se"))
        axis.errorbar(at, mean, error, fmt="o", markersize=3, linewidth=0.8, label=preset)
    axis.set_xticks(range(len(tasks)), tasks, fontsize=7)
    label(axis, "greedy answers", "", "equal tokens from the start", legend=False)
    axis.legend(fontsize=5, frameon=False)
    return made
