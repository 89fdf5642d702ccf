"""What a reader can click, copy or look up in README.md and docs/ is there."""

import ast
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

import turboquant_jax as tq
from docs import notebooks
from experiments import __main__ as experiments
from experiments import front
from turboquant_jax import cache, cli, models
from turboquant_jax.cli import parsers

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
MADE = {path.with_suffix(".md") for path in NOTEBOOKS}  # for the site, by `make docs`
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")} - MADE)
TEXTS = {path: path.read_text() for path in PAGES}


GUIDE = TEXTS[ROOT / "docs/guides/command.md"]
HAVE_DATA = {
    f"turboquant_jax.{name}" for name in ("cache.presets", "models.presets", "models.model")
}


def names(path):
    return str(path.relative_to(ROOT))


def anchors(text):
    """Of the headings, as both GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {re.sub(r"[ -]+", "-", heading.strip()) for heading in plain}


def blocks(text, languages):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [code for language, code in found if language in languages]


@pytest.mark.parametrize("path", PAGES, ids=names)
def test_links_lead_somewhere(path):
    prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "", TEXTS[path], flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", prose)
    for link in (a or b for a, b in links):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{link}: no such file"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text()), f"{link}: no such heading"


def commands():
    """Lines that a reader would type, in fenced or indented blocks."""
    for path, text in TEXTS.items():
        if path.name == "CHANGELOG.md" or path.parent.name == "report":
            continue
        indented = re.findall(r"^    (.*)$", text, re.MULTILINE)
        for line in [*"\n".join(blocks(text, ("", "sh"))).splitlines(), *indented]:
            words = re.split(r" #|  +", line.strip().removeprefix("$ "))[0]
            if words.startswith(("make ", "turboquant-jax ", "python -m experiments ")):
                yield words


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_commands_are_known(line):
    program, *words = shlex.split(line)
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{word}:", makefile, re.MULTILINE) for word in words)
    elif program == "turboquant-jax" and words[0].isupper():
        assert words[0] == "COMMAND"
    elif program == "turboquant-jax":
        parsers.build().parse_args(words)  # exits if a flag is unknown
    elif not {"NAME", "[--check]"} & {*words}:  # those are grammar
        experiments._parser().parse_args(words[2:])


def test_plan_prints_what_the_guide_shows(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    (shown,) = re.findall(
        r"^\$ turboquant-jax (plan .*?)\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE
    )
    assert cli.main(shown[0].split()) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in printed if line] == [line for line in shown[1].splitlines() if line]


def test_python_that_is_shown_is_python():
    shown = [code for text in TEXTS.values() for code in blocks(text, ("python", "py"))]
    assert shown
    for code in shown:
        if ">>>" not in code:  # else it is run
            ast.parse(code)


@pytest.mark.parametrize("package", [tq, cache, models], ids=lambda module: module.__name__)
def test_every_public_name_is_in_the_reference(package):
    reference = "".join(text for path, text in TEXTS.items() if path.parent.name == "api")
    shown = set(re.findall(r"^::: ([\w.]+)$", reference, re.MULTILINE))
    aliases = set(re.findall(r"`tq\.(\w+)`", reference))
    for name in package.__all__:
        found = getattr(package, name)
        module = getattr(found, "__module__", None)
        if module is None or not module.startswith("turboquant_jax"):  # data, or a type's alias
            assert any(hasattr(importlib.import_module(each), name) for each in HAVE_DATA & shown)
        else:
            assert module in shown, f"{name} of {module}"
            assert found.__name__ == name or name in aliases, name


def test_readme_is_a_first_page():
    """600 to 900 words, tables included; code and what tables are ruled with are no words."""
    text = re.sub(r"```.*?```|<[^>]*>|\]\([^)]*\)", "", TEXTS[ROOT / "README.md"], flags=re.DOTALL)
    assert 600 <= len(re.findall(r"[^\s|]*\w[^\s|]*", text)) <= 900


def test_one_version():
    from importlib.metadata import version

    (cited,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    declared = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert cited == declared[1] == version("turboquant-jax")
    assert f"## {cited}" in TEXTS[ROOT / "CHANGELOG.md"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_what_a_notebook_shows_was_made_by_its_cells(path):
    held = json.loads(path.read_text())
    assert held["metadata"]["made_from"] == notebooks.digest(held)
    drawn = [o for cell in held["cells"] for o in cell.get("outputs", ()) if "data" in o]
    assert drawn and "outputs" in held["cells"][1]  # it opens with a picture


def test_a_notebook_that_prints_something_else_is_found():
    alike = notebooks.alike
    assert alike("4 bits: KL 0.0123, +0.52 %, 51 %", "4 bits: KL 0.0124, +0.48 %, 52 %")
    assert not alike("4 bits: KL 0.0123", "4 bits: KL 0.0135")
    assert not alike("51 %", "53 %") and not alike("51 %", "51") and not alike("-0.51", "0.51")
    assert not alike("4 bits: KL 0.0123", "3 bits: KL 0.0123")
    assert not alike("KL 0.012", "KL 0.0120") and not alike("KL 0.012", "loss 0.012")


def test_every_page_is_in_the_menu():
    menu = set(re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert menu == {str(p.relative_to(ROOT / "docs")) for p in {*ROOT.glob("docs/**/*.md")} | MADE}


def test_a_number_that_is_not_in_the_rows_is_found(tmp_path):
    for file in front.FILES:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text((ROOT / file).read_text().replace("3.53x", "3.54x"))
    (tmp_path / front.IMAGES).symlink_to(ROOT / front.IMAGES)
    problems = front.check(tmp_path, ROOT / "experiments/results")
    assert len(problems) == 2 and "README.md" in problems[0] and "presets.md" in problems[1]
