"""What an experiment is: a module with a `Config`, `SMOKE`, `run`, `figure` and `claims`.

The first line of its docstring is its title in the report, the rest introduces it there.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal, Protocol

Row = dict[str, Any]
"""Cells (str, int, float) of a line of `rows.csv`; rows may have different columns."""

Track = Callable[[Sequence[Any], str], Iterable[Any]]
"""Iterate over a sequence under a named progress bar."""

GPU = "an NVIDIA GPU"
"""`NEEDS` of an experiment that runs nowhere else."""

Verdict = Literal["holds", "does not hold", "missed", "not reproducible", "undecided"]
"""`missed` is for an aim of our own; `undecided` where the interval spans the statement."""


@dataclass(frozen=True)
class Claim:
    """A statement by a paper or of theory beside what we measured.

    Attributes:
      source: whose statement it is, such as "TurboQuant, theorem 1".
      statement: what it says, in one line.
      measured: what we found, in one line, with its uncertainty.
      verdict: how the two agree.
      topic: claims of one topic are one line of REPORT.md, in these words.
      short: what that line says of this claim, if not all that is `measured`.
    """

    source: str
    statement: str
    measured: str
    verdict: Verdict
    topic: str = ""
    short: str = ""


PAPER, AIM, QUESTION = "TurboQuant", "our aim", "our question"
"""Sources. The paper's name stands before what the paper says and of its own settings alone."""


def is_aim(claim: Claim) -> bool:
    """Whether it is an aim of our own."""
    return claim.source.endswith(AIM)


class Experiment(Protocol):
    """The names that a module of an experiment has.

    Where there is more, `figure(rows)` draws the rows, which the report shows as a table otherwise;
    `NEEDS` says in words what the full size needs beside the library: a GPU, packages, data;
    `KEYS` are the columns that say what a row measured, so that rows of another run can be added;
    `device()` names the device where it is not jax that measures.
    """

    __name__: str
    __doc__: str | None
    Config: Any
    """A frozen dataclass; each field is a flag, made by `option`."""
    SMOKE: Any
    """A `Config` small enough for CI."""

    def run(self, config: Any, track: Track) -> Iterable[Row]:
        """Measure; rows that are yielded are shown, and kept in a new folder, as they come."""

    def claims(self, rows: Sequence[Row]) -> list[Claim]:
        """Judge the rows; must work on whatever subset of cases was run."""


def option(
    default: Any, description: str, choices: Sequence[str] | None = None, path: bool = False
) -> Any:
    """A field of a `Config`: its help text, its only values, whether it is a path of a machine."""
    return field(default=default, metadata={"help": description, "choices": choices, "path": path})


def name_of(experiment: Experiment | ModuleType) -> str:
    """The name of an experiment is that of its module."""
    return experiment.__name__.rpartition(".")[2]


def needs_of(experiment: Experiment | ModuleType) -> str:
    """What the full size needs."""
    return getattr(experiment, "NEEDS", "")


def keys_of(experiment: Experiment | ModuleType) -> tuple[str, ...]:
    """The columns that say what a row measured.

    Raises:
      ValueError: the experiment does not name them.
    """
    if not (keys := getattr(experiment, "KEYS", ())):
        raise ValueError(f"{name_of(experiment)}: got no KEYS, expected those of its rows")
    return keys


def where(rows: Iterable[Row], **equal: Any) -> list[Row]:
    """The rows whose columns have these values."""
    return [row for row in rows if all(row.get(k) == value for k, value in equal.items())]


def distinct(rows: Iterable[Row], column: str) -> list[Any]:
    """The values of a column, each once, in the order in which they appear."""
    return list(dict.fromkeys(row[column] for row in rows if column in row))
