"""Teacher-forced answers: how likely, whether every token is the most likely, and how changed.

Needles and questions ask the same way (`ask_all`): in full precision, then with every setting.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from experiments.fidelity.allocation import Allocated, remembered
from experiments.fidelity.calibrated import Calibrated, presets_of, uniform
from experiments.fidelity.forcing import Forcing, Pass, cut
from experiments.fidelity.settings import Setting, for_prompts
from experiments.harness import prepared
from experiments.harness.experiment import Row, Track, option
from experiments.harness.journal import open_journal
from experiments.tasks.prompts import Prompts

FULL = "full precision"
Held = Setting | Allocated | Calibrated
Case = tuple[str, Row, Prompts]
"""A name, columns of its rows, prompts."""


@dataclass(frozen=True)
class Asking:
    """What needles and questions have in common to run."""

    model: str = option(prepared.SMOLLM2, f"{', '.join(prepared.MODELS)}, or tiny: random weights")
    settings: int = option(0, "how many settings, 0 for all")
    seed: int = option(0, "seed of the rotations")
    mixed: int = option(0, "whether mixed caches of layer_ablation are asked too, 0 or 1")
    calibrations: tuple[str, ...] = option(
        (), "files of turboquant-jax calibrate: their presets are asked, and the uniform ones alone"
    )
    precision: str = option("tensorfloat32", "of float32 products: choices are coarse")
    seconds: float = option(0.0, "stop starting new settings after so long, 0 for never")


@dataclass(frozen=True)
class Answers:
    """Per prompt and token of its answer; beyond an answer's end nothing is `valid`.

    Attributes:
      valid: which tokens there are.
      nll: negative log-likelihood in nats.
      hit: whether the token is the most likely one.
      same: whether the most likely token is that of full precision.
      kl: divergence from full precision in nats.
    """

    valid: Bool[np.ndarray, "n P"]
    nll: Float[np.ndarray, "n P"]
    hit: Bool[np.ndarray, "n P"]
    same: Bool[np.ndarray, "n P"]
    kl: Float[np.ndarray, "n P"]

    def total(self) -> Float[np.ndarray, " n"]:
        """Negative log-likelihood of every answer."""
        return np.where(self.valid, self.nll, 0).sum(axis=1)

    def exact(self) -> Bool[np.ndarray, " n"]:
        """Whether greedy decoding would give the answer."""
        return np.all(self.hit | ~self.valid, axis=1)

    def agrees(self) -> Bool[np.ndarray, " n"]:
        """Whether every most likely token is that of full precision."""
        return np.all(self.same | ~self.valid, axis=1)


@dataclass(frozen=True)
class Asked:
    """Prompts with the pass in full precision over each of their batches."""

    forcing: Forcing
    prompts: Prompts
    exact: tuple[Pass, ...]


def ask(forcing: Forcing, prompts: Prompts) -> Asked:
    """Pass the prompts in full precision."""
    passes = []
    for _, batch in prompts.batches():
        made = forcing.full(batch.tokens)
        passes.append(Pass(_picked(batch, made, _most(prompts))))  # only the answers' rows
    return Asked(forcing, prompts, tuple(passes))


def full(asked: Asked) -> Answers:
    """The answers in full precision."""
    return _collect(asked, list(asked.exact))


def answers(asked: Asked, setting: Held, seed: int) -> Answers:
    """The answers with a compressed cache; every batch has a rotation of its own."""
    forcing, passes = asked.forcing, []
    for number, (_, batch) in enumerate(asked.prompts.batches()):
        trips = setting.trips(seed + number, forcing.model.config)
        made = forcing.run(batch.tokens, setting.rule, trips)
        passes.append(Pass(_picked(batch, made, _most(asked.prompts))))
    return _collect(asked, passes)


def _most(prompts: Prompts) -> int:
    return int(prompts.count.max())


def _places(batch: Prompts, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the answers' tokens, and which of them there are."""
    step = np.arange(most)[None, :]
    place = np.minimum(batch.start[:, None] + step, batch.tokens.shape[1] - 1)
    return place, step < batch.count[:, None]


def _picked(batch: Prompts, made: Pass, most: int):
    place, _ = _places(batch, most)
    return jnp.take_along_axis(made.hidden, jnp.asarray(place - 1)[..., None], axis=1)


def _collect(asked: Asked, passes: list[Pass]) -> Answers:
    found, most = [], _most(asked.prompts)
    for (rows, batch), exact, made in zip(
        asked.prompts.batches(), asked.exact, passes, strict=True
    ):
        place, valid = _places(batch, most)
        target = np.take_along_axis(batch.tokens, place, axis=1)
        with jax.default_matmul_precision(asked.forcing.precision):
            scored = _score(asked.forcing.model, target, exact.hidden, made.hidden)
        found.append([x[: len(rows)] for x in (valid, *map(np.asarray, scored))])
    return Answers(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


@jax.jit
def _score(model, target, exact, hidden):
    p, q = (jax.nn.log_softmax(model.logits(h)) for h in (exact, hidden))
    nll = -jnp.take_along_axis(q, target[..., None], axis=-1)[..., 0]
    first, other = (jnp.argmax(x, axis=-1) for x in (p, q))
    kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    return nll, other == target, first == other, kl


def ask_all(
    name: str,
    config: Asking,
    cases: Sequence[Case],
    rows_of: "Callable[[Asked, Answers, Row], Iterable[Row]]",
    track: Track,
    choosing: Sequence[str],
) -> list[Row]:
    """Rows of every case in full precision and with every setting.

    Args:
      name: of the experiment and its journal.
      config: what to run.
      cases: what is asked.
      rows_of: answers, and columns of how they were given, to rows.
      track: see `experiment`.
      choosing: fields of the configuration that choose among cases.
    """
    journal = open_journal(name, config, (*choosing, "settings", "mixed", "calibrations"))
    forcing = cut(prepared.model(config.model), config.precision)
    model = forcing.model.config
    settings: list[Held] = [*for_prompts(model.num_layers)]
    if config.calibrations:
        of_files = (presets_of(file, forcing.model) for file in config.calibrations)
        settings = [*itertools.chain(*of_files), *uniform()]
    settings = settings[: config.settings or None]
    settings += remembered() if config.mixed else []
    rows: list[Row] = []
    for case, head, prompts in track(cases, name):
        asked = cache(partial(ask, forcing, prompts))  # only if a journal has not all of it

        head = {"model": config.model, **head}

        def by(answer, columns, asked=asked) -> list[Row]:
            return list(rows_of(asked(), answer(asked()), columns))

        rows += journal.measure(f"{case} {FULL}", partial(by, full, {**head, "preset": FULL}))
        for setting in settings:
            sizes = setting.sizes(model, prompts.tokens.shape[1])
            answer = partial(answers, setting=setting, seed=config.seed)
            make = partial(by, answer, {**head, **setting.columns(), **sizes})
            rows += journal.measure(f"{case} {setting.preset}", make)
    return rows
