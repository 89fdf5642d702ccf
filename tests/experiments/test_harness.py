"""The harness: results whole or not at all, no silent overwriting, a report that can be checked."""

import json
from dataclasses import dataclass
from types import ModuleType

import pytest

from experiments import __main__ as command
from experiments.harness import report, results
from experiments.harness.experiment import Claim, option
from experiments.harness.plotting import panels


@dataclass(frozen=True)
class Config:
    size: int = option(3, "how many rows")
    names: tuple[str, ...] = option(("a", "b"), "names")
    offset: float = option(0.5, "added to every value")


def planted() -> ModuleType:
    """An experiment as small as one can be."""
    module = ModuleType("experiments.planted", "A planted experiment.\n\nIt counts.")
    module.Config, module.SMOKE = Config, Config(size=2)

    def run(config, track):
        return [
            {"name": name, "value": i + config.offset, **({"extra": i} if i else {})}
            for name in config.names
            for i in track(range(config.size), name)
        ]

    def claims(rows):
        total = sum(row["value"] for row in rows)
        return [Claim("theory", "the sum is 9", f"{total:g}", "holds" if total == 9 else "missed")]

    def figure(rows):
        drawn, axes = panels(1, 1)
        axes[0, 0].plot([row["value"] for row in rows])
        return drawn

    module.run, module.claims, module.figure = run, claims, figure
    return module


@pytest.fixture
def experiment(monkeypatch):
    module = planted()
    monkeypatch.setattr(command, "EXPERIMENTS", (module,))
    monkeypatch.setattr(report, "EXPERIMENTS", (module,))
    return module


def run(tmp_path, *flags):
    return command.main(["run", "planted", "--out", str(tmp_path / "results"), *flags])


def write_report(tmp_path, *flags):
    places = ["--out", str(tmp_path / "results"), "--file", str(tmp_path / "REPORT.md")]
    return command.main(["report", *places, *flags])


def test_rows_survive_csv():
    rows = [{"a": 1, "b": "x y"}, {"a": 0.25, "c": 'quoted "," cell'}, {"b": "z", "c": 1e-9}]
    assert results.from_csv(results.to_csv(rows)) == rows


def test_a_run_leaves_rows_meta_and_figure(experiment, tmp_path):
    assert run(tmp_path, "--size", "2", "--names", "x", "y", "z") == 0
    (found,) = results.find(tmp_path / "results", "planted")
    assert [row["name"] for row in found.rows] == ["x", "x", "y", "y", "z", "z"]
    assert "extra" not in found.rows[0] and found.rows[1]["extra"] == 1
    assert found.meta["config"] == {"size": 2, "names": ["x", "y", "z"], "offset": 0.5}
    assert found.meta["command"] == "python -m experiments run planted --size 2 --names x y z"
    assert {"commit", "date", "device", "versions", "seconds"} <= found.meta.keys()
    assert {"python", "jax", "numpy"} <= found.meta["versions"].keys()
    assert (found.folder / "figure.svg").read_text().startswith("<?xml")


def test_smoke_is_its_own_configuration(experiment, tmp_path):
    assert run(tmp_path, "--smoke", "--offset", "1") == 0
    (found,) = results.find(tmp_path / "results", "planted")
    assert found.meta["config"] == {"size": 2, "names": ["a", "b"], "offset": 1.0}


def test_other_configuration_is_not_overwritten(experiment, tmp_path, capsys):
    assert run(tmp_path) == 0
    before = (tmp_path / "results/planted/rows.csv").read_bytes()
    assert run(tmp_path, "--size", "4") == 1
    assert "differs in size" in capsys.readouterr().err
    assert (tmp_path / "results/planted/rows.csv").read_bytes() == before
    assert run(tmp_path) == 0, "the same configuration may be run again"
    assert run(tmp_path, "--size", "4", "--force") == 0
    assert run(tmp_path, "--label", "gpu") == 0, "another label is another place"
    assert len(results.find(tmp_path / "results", "planted")) == 2


def test_a_folder_of_something_else_is_not_overwritten(experiment, tmp_path):
    precious = tmp_path / "results/planted/notes.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("precious")
    assert run(tmp_path) == 1
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("place", ["run", "figure", "save_figure"])
def test_interruption_leaves_the_old_results_whole(experiment, tmp_path, monkeypatch, place):
    assert run(tmp_path) == 0
    folder = tmp_path / "results/planted"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(results if place == "save_figure" else experiment, place, interrupt)
    assert run(tmp_path, "--size", "5", "--force") == 130
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["planted"], "nothing is left behind"


def test_failed_renaming_brings_the_old_results_back(experiment, tmp_path, monkeypatch):
    assert run(tmp_path) == 0
    folder = tmp_path / "results/planted"
    before = (folder / "rows.csv").read_bytes()
    rename = type(folder).rename

    def fail(self, target):
        if self.name == "new":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(type(folder), "rename", fail)
    assert run(tmp_path, "--size", "5", "--force") == 130
    assert (folder / "rows.csv").read_bytes() == before


def test_report_says_what_was_measured(experiment, tmp_path):
    assert run(tmp_path) == 0
    assert write_report(tmp_path) == 0
    text = (tmp_path / "REPORT.md").read_text()
    assert "| theory | the sum is 9 | 9 | **holds** |" in text
    assert "(results/planted/figure.svg)" in text and "It counts." in text
    assert write_report(tmp_path, "--check") == 0


def test_results_of_other_scripts_are_shown_as_they_are(experiment, tmp_path):
    folder = tmp_path / "results/elsewhere"
    meta = {"command": "made elsewhere", "date": "today", "commit": "1", "device": "GPU"}
    results.write(folder, [{"shape": "8 x 4", "ms": 0.5}], meta | {"versions": {}}, None)
    assert run(tmp_path) == 0
    assert write_report(tmp_path) == 0
    text = (tmp_path / "REPORT.md").read_text()
    assert "## `elsewhere`\n\n| shape | ms |\n| --- | --- |\n| 8 x 4 | 0.5 |" in text
    assert "figure.svg" not in text.partition("elsewhere")[2]
    (folder / "rows.csv").write_text("shape,ms\n8 x 4,0.4\n")
    assert write_report(tmp_path, "--check") == 1


def test_check_fails_on_an_altered_csv(experiment, tmp_path, capsys):
    assert run(tmp_path) == 0
    assert write_report(tmp_path) == 0
    path = tmp_path / "results/planted/rows.csv"
    path.write_text(path.read_text().replace("2.5", "2.6"))
    assert write_report(tmp_path, "--check") == 1
    complaint = capsys.readouterr().err
    assert "altered since its run" in complaint and "disagrees with the results" in complaint


def test_check_fails_on_newer_results_and_on_an_altered_report(experiment, tmp_path):
    assert run(tmp_path) == 0
    assert write_report(tmp_path) == 0
    path = tmp_path / "REPORT.md"
    text = path.read_text()
    path.write_text(text.replace("**holds**", "**missed**"))
    assert write_report(tmp_path, "--check") == 1
    path.write_text(text)
    assert run(tmp_path, "--size", "4", "--force") == 0
    assert write_report(tmp_path, "--check") == 1


def test_check_draws_nothing_and_missing_figures_are_drawn(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "find_spec", lambda name: None)  # a machine without matplotlib
    assert run(tmp_path) == 0
    path = tmp_path / "results/planted/figure.svg"
    assert not path.exists()
    monkeypatch.undo()
    monkeypatch.setattr(report, "EXPERIMENTS", (experiment,))
    assert write_report(tmp_path) == 0
    assert path.exists()
    first = path.read_bytes()
    monkeypatch.setattr(experiment, "figure", None)
    assert write_report(tmp_path, "--check") == 0
    assert path.read_bytes() == first


def test_meta_is_json_with_a_digest(experiment, tmp_path):
    assert run(tmp_path) == 0
    folder = tmp_path / "results/planted"
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["rows_sha256"] == results.digest((folder / "rows.csv").read_bytes())


def test_a_table_is_described_by_its_command_line(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Measured:
        name: str
        milliseconds: float

    monkeypatch.setattr("sys.argv", ["experiments/step_speed.py", "--bits", "4"])
    results.write_table(tmp_path / "table", [Measured("step", 1.5)], 2.0)
    found = results.read(tmp_path / "table")
    assert found.rows == [{"name": "step", "milliseconds": 1.5}]
    assert found.meta["command"] == "python -m experiments.speed.step_speed --bits 4"
    assert found.intact


def test_runs_elsewhere_are_added_and_never_lost(tmp_path, experiment, capsys):
    """Rows of the same model and kind are replaced, all others stay, every run is named."""

    def write(folder, rows, command):
        meta = {"config": results.config_of(Config()), "command": command, "versions": {}}
        meta |= {"date": "today", "commit": "0", "device": "here"}
        results.write(folder, rows, meta, None)

    held, other = tmp_path / "results" / "planted", tmp_path / "elsewhere" / "planted"
    small, large = ({"model": m, "kind": "k", "value": 1.5} for m in ("small", "large"))
    write(held, [small], "first")
    for value in (2.0, 6.0):
        write(other, [large | {"value": value}], "second")
        assert command.main(["add", str(other), "--out", str(held.parent)]) == 0
    found = results.read(held)
    assert found.rows == [small, large | {"value": 6}] and found.intact
    assert found.meta["command"] == "first"
    assert [meta["command"] for meta in found.meta["added"]] == ["second"]
    assert write_report(tmp_path) == 0
    assert "`second`, today" in (tmp_path / "REPORT.md").read_text()
    assert run(tmp_path) == 1
    assert "holds rows of other runs too" in capsys.readouterr().err
    (other / "rows.csv").write_text("altered")
    assert command.main(["add", str(other), "--out", str(held.parent)]) == 1
