"""The notebooks: run them, check what they printed, and turn them into pages of the site.

    python -m docs.notebooks run [NAME...]      run every cell in order; keep texts and figures
    python -m docs.notebooks check [NAME...]    run, and compare with the texts that are kept
    python -m docs.notebooks pages              pages of the site from what is kept, without running

Cells run in plain Python, one namespace a notebook. No Jupyter is needed; any can open the files
(nbformat 4). A kept notebook says from which cells it was made.
"""

import ast
import base64
import contextlib
import hashlib
import io
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "notebooks"


def main(arguments: list[str]) -> int:
    """One of the three; 1 where a notebook no longer prints what is kept."""
    way, *names = arguments
    paths = [FOLDER / f"{name}.ipynb" for name in names] or sorted(FOLDER.glob("*.ipynb"))
    if way == "pages":
        for path in paths:
            page(path)
        return 0
    changed = 0
    for path in paths:
        start = time.process_time()
        held = json.loads(path.read_text())
        made = run(held, path.stem)
        print(f"{path.name}: {time.process_time() - start:.0f} CPU seconds", flush=True)
        if way == "run":
            path.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")
        for number, (before, after) in enumerate(zip(texts(held), texts(made), strict=True), 1):
            if way == "check" and not alike(before, after):
                changed = 1
                print(f"{path.name}, cell {number}: kept {before!r}, got {after!r}")
    return changed


def run(notebook: dict[str, Any], name: str) -> dict[str, Any]:
    """The notebook with new outputs."""
    import matplotlib

    matplotlib.use("Agg")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells = []
    for number, cell in enumerate(notebook["cells"], 1):
        if cell["cell_type"] == "code":
            code = compile("".join(cell["source"]), f"{name}, cell {number}", "exec")
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(code, namespace)
            cell = cell | {"outputs": [*_outputs(printed.getvalue())]}
        cells.append(cell)
    made_from = {"made_from": digest(notebook)}
    return notebook | {"cells": cells, "metadata": notebook["metadata"] | made_from}


def _outputs(printed: str) -> Iterator[dict[str, Any]]:
    """What a cell printed, then the figures that it drew."""
    import matplotlib.pyplot as plt

    if printed:
        yield {"output_type": "stream", "name": "stdout", "text": printed.splitlines(True)}
    for number in plt.get_fignums():
        file = io.BytesIO()
        plt.figure(number).savefig(file, dpi=80, metadata={"Software": None})
        image = base64.b64encode(file.getvalue()).decode()
        yield {"output_type": "display_data", "metadata": {}, "data": {"image/png": image}}
    plt.close("all")


def digest(notebook: dict[str, Any]) -> str:
    """Of the code cells, however they are formatted."""
    sources = ("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code")
    trees = [ast.dump(ast.parse(source)) for source in sources]
    return hashlib.sha256("\0".join(trees).encode()).hexdigest()[:16]


def texts(notebook: dict[str, Any]) -> list[str]:
    """What each cell printed."""
    return [
        "".join("".join(o["text"]) for o in cell.get("outputs", ()) if "text" in o)
        for cell in notebook["cells"]
    ]


NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?: %)?")


def alike(kept: str, got: str) -> bool:
    """The same words, and numbers ten apart in the last digit at most, whole percents one.

    Another processor sums in another order, and now and then a code is another then.
    """
    if NUMBER.sub("#", kept) != NUMBER.sub("#", got):
        return False
    return all(
        _form(a) == _form(b) and abs(_digits(a) - _digits(b)) <= _apart(a)
        for a, b in zip(NUMBER.findall(kept), NUMBER.findall(got), strict=True)
    )


def _form(number: str) -> tuple[int, bool]:
    """Decimals, and whether it is a percentage."""
    return len(number.rstrip(" %").partition(".")[2]), number.endswith("%")


def _digits(number: str) -> int:
    return int(re.sub(r"[,. %]", "", number))


def _apart(number: str) -> int:
    return 10 if "." in number else int(number.endswith("%"))


def page(path: Path) -> None:
    """A page of the site beside the notebook, and its figures."""
    lines = []
    images = FOLDER / "images"
    images.mkdir(exist_ok=True)
    for number, cell in enumerate(json.loads(path.read_text())["cells"], 1):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines.append(source)
            continue
        lines.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if "text" in output:
                lines.append(f"```\n{''.join(output['text'])}```")
            else:
                image = images / f"{path.stem}-{number}.png"
                image.write_bytes(base64.b64decode(output["data"]["image/png"]))
                lines.append(f"![What the cell above draws.](images/{image.name})")
    path.with_suffix(".md").write_text("\n\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
