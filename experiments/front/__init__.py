"""The first page: tables and pictures that README.md and the site show, held to committed rows.

A table stands between `<!-- NAME: from the rows -->` and `<!-- end -->`: `report` writes it and
`report --check` compares it. A picture names the rows that it was drawn from.
"""

import re
from collections.abc import Callable
from pathlib import Path

from experiments.front.pictures import PICTURES
from experiments.front.tables import TABLES
from experiments.harness import plotting, results
from experiments.harness.plotting import Figure

FILES = ("README.md", "docs/guides/measured.md", "docs/guides/presets.md")
IMAGES = Path("docs/images")

_BLOCK = re.compile(r"<!-- ([\w-]+): from the rows -->\n.*?<!-- end -->", re.DOTALL)


def fill(text: str, out: Path) -> str:
    """The text with every table made anew."""

    def made(found: re.Match[str]) -> str:
        name = found[1]
        lines = "\n".join(TABLES[name](out))
        return f"<!-- {name}: from the rows -->\n\n{lines}\n\n<!-- end -->"

    return _BLOCK.sub(made, text)


def write(root: Path, out: Path) -> None:
    """The tables of every file."""
    for path in (root / file for file in FILES):
        path.write_text(fill(path.read_text(), out))


def draw(root: Path, out: Path, everything: bool = False) -> None:
    """The pictures whose rows have changed, or all, each for light and for dark pages."""
    for name, (make, _) in PICTURES.items():
        if not everything and not _stale(name, root, out):
            continue

        def drawn(make: Callable[[Path], Figure] = make) -> Figure:
            return make(out)

        plotting.save_themes(root / IMAGES, name, drawn, source(name, out))


def source(name: str, out: Path) -> str:
    """What a picture was drawn from: folders of results, and digests of their rows."""
    return "; ".join(
        f"{folder} {results.digest((out / folder / 'rows.csv').read_bytes())[:16]}"
        for folder in PICTURES[name][1]
    )


def check(root: Path, out: Path) -> list[str]:
    """What disagrees with the rows, a line each."""
    problems = []
    for path in (root / file for file in FILES):
        if fill(path.read_text(), out) != path.read_text():
            problems.append(f"{path}: a table disagrees with its rows; run report")
    for name in PICTURES:
        problems += [
            f"{path}: drawn from other rows; run report" for path in _stale(name, root, out)
        ]
    return problems


def _stale(name: str, root: Path, out: Path) -> list[Path]:
    """The files of a picture that are missing, or were drawn from other rows."""
    paths = [root / IMAGES / f"{name}-{theme}.svg" for theme in plotting.INKS]
    text = source(name, out)
    return [path for path in paths if not path.exists() or text not in path.read_text()]
