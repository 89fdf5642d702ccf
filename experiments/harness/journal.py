"""Rows as they come, so that a run that was cut short goes on where it stopped.

With the environment variable EXPERIMENTS_JOURNAL a folder, every measured case is a line of JSON
there, in a file of its own for each configuration; without it nothing is kept. A time limit ends a
run between two cases.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.harness import results
from experiments.harness.experiment import Row

FOLDER = "EXPERIMENTS_JOURNAL"


@dataclass
class Journal:
    """What was measured: the rows of every case by its name."""

    path: Path | None
    start: float
    seconds: float
    held: dict[str, list[Row]] = field(default_factory=dict)

    def has_time(self, share: float = 1.0) -> bool:
        """Whether this share of the time is not over."""
        return time.monotonic() <= self.start + share * self.seconds

    def measure(self, case: str, make: Callable[[], list[Row]], *, share: float = 1.0) -> list[Row]:
        """Rows of a case: held ones, new ones, or none because this share of the time is over."""
        if case in self.held:
            return self.held[case]
        if not self.has_time(share):
            return []
        start = time.monotonic()
        rows = self.held[case] = make()
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"case": case, "rows": rows}) + "\n")
            print(f"{case}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
        return rows


def open_journal(name: str, config: Any, choosing: Sequence[str] = ()) -> Journal:
    """The journal of an experiment. `config.seconds` is the time limit, 0 for none.

    The limit itself may change between runs, and so may the fields that are `choosing` among cases:
    processes side by side then share a journal. Every other field belongs to the configuration.
    """
    seconds = config.seconds or float("inf")
    start = time.monotonic()
    folder = os.environ.get(FOLDER)
    if not folder:
        return Journal(None, start, seconds)
    fields = {k: v for k, v in asdict(config).items() if k not in ("seconds", *choosing)}
    digest = results.digest(json.dumps(fields, sort_keys=True).encode())[:8]
    path = Path(folder, f"{name}-{digest}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    held = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:  # cut off in the middle of its last line
            continue
        held[entry["case"]] = entry["rows"]
    return Journal(path, start, seconds, held)
