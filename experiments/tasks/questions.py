"""Questions answered through a compressed cache.

SmolLM2-135M is too weak for most scores to tell quantizers apart, so agreement with full precision
stands beside each of them. Every answer is teacher-forced behind a prompt long enough for the cache
to be compressed. HellaSwag (100 cases behind solved ones, 512 tokens): the ending of the least loss
per character is chosen, and `agrees` is the share of equal choices. SQuAD (2,048 tokens) and
HotpotQA (4,096): `score` is the share of answers that greedy decoding would give word for word,
`agrees` that of prompts with the same most likely token at every place of the answer. HumanEval and
GSM8K (2,048): nothing is executed; `score` is the share of the solution's tokens that are the most
likely ones, and `agrees` that of the tokens which stay so. So it is for RULER's tasks of tracing
and counting (`ruler_prompts`, 2,048). `nll_change` and `kl` are per token of the answer, in nats,
with errors over cases. Intervals are Wilson's at 95 %, over cases, and for the solutions over their
tokens as if these were independent. The caches with bits by layer or head (`--mixed 1`) were not
asked, and `lossless` was the scalar code, not the preset's trellis.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from jaxtyping import Bool, Int

from experiments.fidelity.settings import PAPERS
from experiments.harness import prepared
from experiments.harness.experiment import AIM, QUESTION, Claim, Row, Track, distinct, option, where
from experiments.harness.plotting import COLOURS, Figure, label, panels
from experiments.harness.statistics import are_below, is_below, of_aim, wilson
from experiments.tasks import answers, ruler_prompts
from experiments.tasks.answers import FULL, Answers, Asked, Asking, ask_all
from experiments.tasks.prompts import Prompts, load, random_prompts
from experiments.tasks.question_prompts import SIZES
from turboquant_jax.cache.presets import Preset

_NAMES = {"hellaswag": "HellaSwag", "squad": "SQuAD", "hotpot": "HotpotQA"}
_NAMES |= {"human_eval": "HumanEval", "gsm8k": "GSM8K", "variables": "variables"}
_NAMES |= {"common": "common words", "frequent": "frequent words"}
_BY_TOKEN = ("human_eval", "gsm8k", *ruler_prompts.TASKS)


NEEDS = prepared.NEEDS
KEYS = ("model", "task", "context", "preset")


@dataclass(frozen=True)
class Config(Asking):
    """What to run."""

    tasks: tuple[str, ...] = option((*SIZES, *ruler_prompts.TASKS), "which questions")


SMOKE = Config("tiny", 1, tasks=("hellaswag",))


def run(config: Config, track: Track) -> list[Row]:
    """Every task in full precision and with every setting."""
    prompts = {task: _prompts(config, task) for task in config.tasks}
    cases = [
        (task, {"task": task, "context": found.tokens.shape[1]}, found)
        for task, found in prompts.items()
    ]
    return ask_all("questions", config, cases, _rows, track, ("tasks",))


def _prompts(config: Config, task: str) -> Prompts:
    if config.model != "tiny":
        return load(f"questions/{task}", config.model)
    labels = {"case": np.repeat(np.arange(2), 2), "ending": np.tile(np.arange(2), 2)}
    labels |= {"correct": np.array([1, 0, 0, 1]), "letters": np.full(4, 4)}
    return random_prompts(4, 160, **labels)


def _rows(asked: Asked, made: Answers, columns: Row) -> Iterator[Row]:
    exact = answers.full(asked)
    if columns["task"] == "hellaswag":
        chosen, wanted = choices(asked.prompts, made)
        score, agrees = chosen == wanted, chosen == choices(asked.prompts, exact)[0]
    elif columns["task"] in _BY_TOKEN:
        score, agrees = made.hit[made.valid], made.same[made.valid]
    else:
        score, agrees = made.exact(), made.agrees()
    low, high = wilson(int(score.sum()), len(score))
    agree_low, agree_high = wilson(int(agrees.sum()), len(agrees))
    change = (made.total() - exact.total()) / made.valid.sum(axis=1)
    kl = np.where(made.valid, made.kl, 0).sum(axis=1) / made.valid.sum(axis=1)
    cases = len(change)
    yield {
        **columns,
        "cases": len(score),
        "score": float(score.mean()),
        "score_low": low,
        "score_high": high,
        "agrees": float(agrees.mean()),
        "agrees_low": agree_low,
        "agrees_high": agree_high,
        "nll_full": float(exact.nll[exact.valid].mean()),
        "nll_change": float(change.mean()),
        "nll_change_se": float(change.std(ddof=1) / np.sqrt(cases)),
        "kl": float(kl.mean()),
        "kl_se": float(kl.std(ddof=1) / np.sqrt(cases)),
    }


def choices(
    prompts: Prompts, made: Answers
) -> tuple[Int[np.ndarray, " cases"], Int[np.ndarray, " cases"]]:
    """The ending of the least loss per character, and the right one, of every case."""
    loss = made.total() / prompts.labels["letters"]
    cases = prompts.labels["case"]
    ending = prompts.labels["ending"]
    correct: Bool[np.ndarray, " n"] = prompts.labels["correct"].astype(bool)
    chosen = [ending[at][np.argmin(loss[at])] for at in (cases == c for c in np.unique(cases))]
    return np.array(chosen), ending[correct][np.argsort(cases[correct])]


def claims(rows: Sequence[Row]) -> list[Claim]:
    """Whether scores move, and how far answers behind long contexts do."""
    full = {row["task"]: row for row in where(rows, preset=FULL)}
    made = []
    for preset in distinct(rows, "preset"):
        found = [row for row in where(rows, preset=preset) if row["task"] in full]
        if preset == FULL or not found:
            continue
        inside = [r["score_low"] <= full[r["task"]]["score"] <= r["score_high"] for r in found]
        made.append(
            Claim(
                "TurboQuant, section 4.3" if preset == PAPERS else QUESTION,
                f"{preset} scores like full precision, within its interval",
                "; ".join(
                    f"{_NAMES[r['task']]} {r['score']:.3f} ({full[r['task']]['score']:.3f}), "
                    f"agreement {r['agrees']:.0%}"
                    for r in found
                ),
                "holds" if all(inside) else "does not hold",
            )
        )
        long = [row for row in found if row["task"] in ("squad", "hotpot")]
        if not long:
            continue
        verdicts = [is_below(row["kl"], row["kl_se"], 0.01) for row in long]
        made.append(
            Claim(
                AIM if preset.split(" (")[0] in get_args(Preset) else QUESTION,
                f"{preset} changes an answer from documents by at most 0.01 nats a token of KL",
                "; ".join(
                    f"{_NAMES[r['task']]}, {r['context']:,} tokens: {r['kl']:.4f} ± "
                    f"{r['kl_se']:.4f}, its loss by {r['nll_change']:+.3f}"
                    for r in long
                ),
                of_aim(are_below(verdicts)),
                topic="presets change an answer from documents by at most 0.01 nats a token of KL",
                short=f"{preset.partition(' ')[0]} {max(row['kl'] for row in long):.3f}",
            )
        )
    return made or [Claim(QUESTION, "scores do not move", "full precision only", "undecided")]


def figure(rows: Sequence[Row]) -> Figure:
    """Scores with intervals, and agreement with full precision."""
    made, axes = panels(1, 2, 6.5, 4.0)
    tasks = distinct(rows, "task")
    shown = distinct(rows, "preset")
    for axis, column, title in zip(
        axes[0], ("score", "agrees"), ("score", "agreement with full precision"), strict=True
    ):
        for i, preset in enumerate(shown):
            found = {row["task"]: row for row in where(rows, preset=preset)}
            at = np.array([tasks.index(task) for task in found]) + 0.09 * (i - len(shown) / 2)
            value = np.array([row[column] for row in found.values()])
            low, high = (
                np.array([row[f"{column}_{side}"] for row in found.values()])
                for side in ("low", "high")
            )
            axis.errorbar(
                at,
                value,
                np.maximum([value - low, high - value], 0),
                fmt="os^"[i // len(COLOURS)],
                markersize=3,
                linewidth=0.8,
                color=COLOURS[i % len(COLOURS)],
                label=preset,
            )
        axis.set_xticks(range(len(tasks)), [_NAMES[task] for task in tasks], fontsize=7)
        label(axis, title, "", "share", legend=False)
    axes[0, 1].legend(fontsize=5, frameon=False, loc="lower left")
    return made
