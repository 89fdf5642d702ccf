"""What a setting costs on texts, per token, and how sure that is.

The unit of the statistics is a chunk of 1,024 tokens (a text, where it is shorter), in which the
loss in full precision is paired with the loss with compression, averaged over the seeds. Standard
errors are those of chunks and of seeds in quadrature.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float

from experiments.fidelity.forcing import Forcing, Pass, Trips
from experiments.fidelity.rule import Rule
from experiments.harness.experiment import Row
from turboquant_jax.models import LlamaConfig

CHUNK = 1024


@dataclass(frozen=True)
class Losses:
    """Per predicted token; the attention error per text, mean over layers, None if not measured."""

    full: Float[np.ndarray, "B T"]
    nll: Float[np.ndarray, "seeds B T"]
    kl: Float[np.ndarray, "seeds B T"]
    agrees: Float[np.ndarray, "seeds B T"]
    attention: Float[np.ndarray, "seeds B"] | None

    def rows(self, which: slice) -> "Losses":
        """Some of the texts."""
        return Losses(
            self.full[which],
            self.nll[:, which],
            self.kl[:, which],
            self.agrees[:, which],
            None if self.attention is None else self.attention[:, which],
        )

    def last(self, count: int) -> "Losses":
        """Of each text the last predictions; attention errors are those of the whole text."""
        full, nll, kl, agrees = (
            x[..., -count:] for x in (self.full, self.nll, self.kl, self.agrees)
        )
        return Losses(full, nll, kl, agrees, self.attention)

    def columns(self) -> Row:
        """Perplexity, KL, agreement and errors; changes are fractions."""
        seeds = len(self.nll)
        change, change_se = _mean_and_error(self.nll - self.full[None])
        kl, kl_se = _mean_and_error(self.kl)
        top1, top1_se = _mean_and_error(self.agrees)
        row: Row = {
            "tokens": int(self.full.size),
            "seeds": seeds,
            "perplexity_full": float(np.exp(self.full.mean(dtype=np.float64))),
            "perplexity": float(np.exp(self.nll.mean(dtype=np.float64))),
            "perplexity_change": float(np.expm1(change)),
            "perplexity_change_se": float(np.exp(change) * change_se),
            "kl": kl,
            "kl_se": kl_se,
            "kl_p99": float(np.mean([np.quantile(one, 0.99) for one in self.kl])),
            "kl_seeds_sd": float(self.kl.mean((1, 2)).std(ddof=1)) if seeds > 1 else 0.0,
            "top1": top1,
            "top1_se": top1_se,
        }
        if self.attention is not None:
            row["attention_error"] = float(self.attention.mean())
        return row


def _mean_and_error(x: Float[np.ndarray, "seeds B T"]) -> tuple[float, float]:
    x = np.asarray(x, np.float64)
    pieces = np.array_split(x.mean(axis=0), max(1, x.shape[2] // CHUNK), axis=1)
    chunks = np.concatenate([piece.mean(axis=1) for piece in pieces])
    variance = chunks.var(ddof=1) / len(chunks) if len(chunks) > 1 else 0.0
    if len(x) > 1:
        variance += x.mean(axis=(1, 2)).var(ddof=1) / len(x)
    return float(x.mean()), float(np.sqrt(variance))


@dataclass(frozen=True)
class Subject:
    """Texts of one length, by name, with what the model makes of them in full precision."""

    forcing: Forcing
    names: tuple[str, ...]
    slices: tuple[slice, ...]
    batches: tuple[np.ndarray, ...]
    exact: tuple[Pass, ...]
    nll: Float[np.ndarray, "B T"]


def subject(
    forcing: Forcing, texts: Mapping[str, np.ndarray], most_tokens: int, keep: bool = False
) -> Subject:
    """Put texts into batches of at most `most_tokens` tokens, at least one text each.

    `keep` what enters every layer, so that passes can begin at the first that is compressed.
    """
    edges = np.cumsum([0, *(len(rows) for rows in texts.values())])
    slices = tuple(slice(a, b) for a, b in zip(edges[:-1].tolist(), edges[1:].tolist()))
    tokens = np.concatenate(list(texts.values()))
    size = max(1, most_tokens // tokens.shape[1])
    batches = tuple(tokens[i : i + size] for i in range(0, len(tokens), size))
    exact = tuple(forcing.full(batch, keep) for batch in batches)
    nll = [forcing.compare(b, e, e).nll for b, e in zip(batches, exact, strict=True)]
    return Subject(forcing, tuple(texts), slices, batches, exact, np.concatenate(nll))


class Cached(Protocol):
    """A way to hold a cache."""

    @property
    def rule(self) -> Rule:
        """Which tokens are compressed when."""

    @property
    def first_layer(self) -> int:
        """The first layer that is compressed."""

    @property
    def is_random(self) -> bool:
        """Whether seeds make a difference."""

    def trips(self, seed: int, model: LlamaConfig) -> Trips:
        """What keys and values go through."""


def measure(
    subject: Subject, setting: Cached, seeds: Sequence[int], errors: bool = False
) -> Losses:
    """The losses of a setting; without randomness one seed is enough."""
    forcing, found = subject.forcing, []
    config = forcing.model.config
    for seed in seeds if setting.is_random else seeds[:1]:
        trips = setting.trips(seed, config)
        parts = []
        for tokens, exact in zip(subject.batches, subject.exact, strict=True):
            first = setting.first_layer
            resume = (first, exact.entering[first]) if exact.entering else None
            made = forcing.run(tokens, setting.rule, trips, errors, resume)
            compared = forcing.compare(tokens, exact, made)
            error = None if made.attention_error is None else made.attention_error.mean(axis=0)
            parts.append((compared.nll, compared.kl, compared.agrees, error))
        *arrays, error = zip(*parts, strict=True)
        found.append(
            (*(np.concatenate(a) for a in arrays), np.concatenate(error) if errors else None)
        )
    nll, kl, agrees, error = zip(*found, strict=True)
    return Losses(
        subject.nll,
        np.stack(nll),
        np.stack(kl),
        np.stack(agrees),
        np.stack(error) if errors else None,
    )
