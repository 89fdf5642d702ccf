"""The report from the committed results: a page for each experiment, and REPORT.md before them.

A page sets every statement of a paper, of theory or of our own beside what we measured.
"""

import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from experiments.harness import results, summary
from experiments.harness.experiment import Claim, Experiment, Row, name_of
from experiments.harness.plotting import Figure
from experiments.harness.results import Results
from experiments.harness.summary import Judged

PAGES = Path("docs/report")
ARCHIVES = ("queued", "before", "idle")
"""Labels of earlier runs, which the report leaves out and --check still reads."""


def draw(experiment: Experiment, rows: Sequence[Row]) -> Figure | None:
    """The figure of an experiment; None if it has none, or on a machine without matplotlib."""
    figure = getattr(experiment, "figure", None)
    if figure is None or find_spec("matplotlib") is None:
        return None
    import matplotlib

    matplotlib.use("svg")
    return figure(rows)


def draw_missing(experiments: Sequence[Experiment], out: Path, everything: bool = False) -> None:
    """Draw the figures that runs elsewhere could not, or all of them."""
    for experiment in experiments:
        for result in _shown(out, experiment):
            path = result.folder / "figure.svg"
            if everything or not path.exists():
                figure = draw(experiment, result.rows)
                if figure is not None:
                    results.save_figure(path, figure)


def write(experiments: Sequence[Experiment], out: Path, file: Path) -> None:
    """Write REPORT.md and the pages; a page of no experiment goes."""
    texts = compose(experiments, out, file)
    for path in _pages(file):
        if path not in texts:
            path.unlink()
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def check(experiments: Sequence[Experiment], out: Path, file: Path) -> list[str]:
    """What is wrong with the report: one line for each disagreement with the results."""
    problems = []
    for result in map(results.read, sorted(path.parent for path in out.glob("*/rows.csv"))):
        if not result.intact:
            problems.append(f"{result.folder / 'rows.csv'}: altered since its run")
        if result.meta.get("unfinished"):
            problems.append(f"{result.folder}: its run was cut short")
    texts = compose(experiments, out, file)
    problems += [f"{path}: of no experiment" for path in _pages(file) if path not in texts]
    for path, expected in texts.items():
        written = path.read_text() if path.exists() else ""
        if written != expected:
            pairs = zip(written.splitlines(), expected.splitlines(), strict=False)
            line = next((i for i, (a, b) in enumerate(pairs, 1) if a != b), "the end")
            problems.append(
                f"{path}: disagrees with the results, first at line {line}; "
                "run python -m experiments report"
            )
    return problems


def compose(experiments: Sequence[Experiment], out: Path, file: Path) -> dict[Path, str]:
    """The text of REPORT.md at `file` and of every page below its folder."""
    texts, judged = {file: ""}, list[Judged]()
    for experiment in experiments:
        if not (found := _shown(out, experiment)):
            continue
        path = file.parent / PAGES / f"{name_of(experiment)}.md"
        claims = [(result, experiment.claims(result.rows)) for result in found]
        texts[path] = _page(experiment, claims, path.parent)
        link = os.path.relpath(path, file.parent)
        judged += [Judged(experiment, _label(result), link, made) for result, made in claims]
    kept = {result.folder for experiment in experiments for result in _shown(out, experiment)}
    others = sorted(path.parent.name for path in out.glob("*/rows.csv") if path.parent not in kept)
    texts[file] = summary.compose(judged, others)
    return texts


def _shown(out: Path, experiment: Experiment) -> list[Results]:
    found = results.find(out, name_of(experiment))
    return [result for result in found if _label(result) not in ARCHIVES]


def _label(result: Results) -> str:
    return result.folder.name.partition(".")[2]


def _pages(file: Path) -> list[Path]:
    return sorted((file.parent / PAGES).glob("*.md"))


def _page(experiment: Experiment, found: Sequence[tuple[Results, list[Claim]]], base: Path) -> str:
    """Title and text of the docstring, then the claims of every run."""
    title, _, text = (experiment.__doc__ or "").partition("\n")
    lines = [f"# {title.rstrip('.')}", "", _plain(text.strip()), "", summary.GENERATED, ""]
    for result, claims in found:
        label = _label(result)
        lines += [f"## {label}", ""] if label else []
        lines += [*_section(title, result, claims, base)]
    return "\n".join(lines)


def _section(title: str, result: Results, claims: list[Claim], base: Path) -> Iterator[str]:
    link = os.path.relpath(result.folder, base)
    yield from ("| source | statement | measured | verdict |", "| --- | --- | --- | --- |")
    for claim in claims:
        cells = map(_plain, (claim.source, claim.statement, claim.measured))
        yield f"| {' | '.join(cells)} | **{claim.verdict}** |"
    yield ""
    figure = (result.folder / "figure.svg").exists()
    yield from [f"![{title}]({link}/figure.svg)"] if figure else _table(result.rows)
    yield ""
    runs = "; ".join(map(_run, [result.meta, *result.meta.get("added", [])]))
    sha = result.meta["rows_sha256"][:12]
    yield f"{runs}. [{len(result.rows)} rows]({link}/rows.csv), SHA-256 {sha}.\n"


def _plain(text: str) -> str:
    """Markdown in which <v, x> outside of code is not taken for a tag."""
    parts = text.split("`")
    parts[::2] = [part.replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)


def _table(rows: Sequence[Row]) -> Iterator[str]:
    """All rows."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    yield f"| {' | '.join(columns)} |"
    yield f"| {' | '.join('---' for _ in columns)} |"
    for row in rows:
        yield f"| {' | '.join(_cell(row.get(column, '')) for column in columns)} |"


def _cell(cell: str | int | float) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _run(meta: dict[str, Any]) -> str:
    """How, when and where rows were made."""
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    seconds = f", {meta['seconds']:.0f} s" if "seconds" in meta else ""
    load = f" at load {meta['load_average']}" if "load_average" in meta else ""
    return (
        f"`{meta['command']}`, {meta['date']}, commit {meta['commit']}, {meta['device']}"
        f"{seconds}{load}; {versions}"
    )
