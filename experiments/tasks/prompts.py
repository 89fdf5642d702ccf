"""Prompts with an answer that is teacher-forced: what needles and questions are made of."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from experiments.harness import prepared
from turboquant_jax.models.tokenizer import Tokenizer

_PAD = 0


@dataclass(frozen=True)
class Prompts:
    """Prompts with an answer that is teacher-forced, padded at the end.

    `start` and `count` are the first token of the answer and its tokens; `labels` has what an
    experiment groups by, [n] each.
    """

    tokens: Int[np.ndarray, "n T"]
    start: Int[np.ndarray, " n"]
    count: Int[np.ndarray, " n"]
    labels: Mapping[str, np.ndarray]

    def batches(self) -> Iterator[tuple[np.ndarray, "Prompts"]]:
        """Rows of a pass at a time, all of the same number: the last are filled up with others."""
        size = min(len(self.tokens), max(1, prepared.PASS_TOKENS // self.tokens.shape[1]))
        for first in range(0, len(self.tokens), size):
            rows = np.arange(first, min(first + size, len(self.tokens)))
            padded = np.resize(rows, size)
            yield (
                rows,
                Prompts(self.tokens[padded], self.start[padded], self.count[padded], {}),
            )


def pack(rows: Sequence[tuple[list[int], list[int]]], size: int, **labels: Any) -> Prompts:
    """Prompts from (context, answer) pairs of token ids.

    Raises:
      ValueError: a pair of more than `size` tokens.
    """
    tokens = np.full((len(rows), size), _PAD, np.int32)
    for row, (context, answer) in zip(tokens, rows, strict=True):
        ids = context + answer
        if len(ids) > size:
            raise ValueError(f"a prompt has {len(ids)} tokens, expected at most {size}")
        row[: len(ids)] = ids
    start, count = (np.array([len(r[i]) for r in rows], np.int32) for i in (0, 1))
    return Prompts(tokens, start, count, {k: np.asarray(v) for k, v in labels.items()})


def chat(tokenizer: Tokenizer, request: str) -> str:
    """A user's request, up to where the answer begins."""
    return tokenizer.apply_chat([{"role": "user", "content": request}])


def load(name: str, model: str) -> Prompts:
    """Those of a model by name, such as "needle/single/1024".

    Raises:
      MissingDataError: `.data/` has none.
    """
    held = prepared.prompts(name, model)
    tokens, start, count = (held.pop(part) for part in ("tokens", "start", "count"))
    return Prompts(tokens.astype(np.int32), start, count, held)


def random_prompts(count: int, context: int, **labels: np.ndarray) -> Prompts:
    """For the tiny model, with answers of four tokens at the end."""
    rows = [(row[:-4], row[-4:]) for row in prepared.random_texts(count, context).tolist()]
    return pack(rows, context, **labels)
