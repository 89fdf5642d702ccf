"""The harness: results whole or not at all, no silent overwriting, a report that can be checked."""

import json
from dataclasses import dataclass
from types import ModuleType

import pytest

from experiments import __main__ as command
from experiments.catalogue import EXPERIMENTS
from experiments.harness import report, results
from experiments.harness.experiment import GPU, Claim, name_of, option
from experiments.harness.plotting import panels

PAGE = "docs/report/planted.md"


@dataclass(frozen=True)
class Config:
    size: int = option(3, "how many rows")
    names: tuple[str, ...] = option(("a", "b"), "names")
    offset: float = option(0.5, "added to every value")


def planted() -> ModuleType:
    """An experiment as small as one can be."""
    module = ModuleType("experiments.planted.planted", "A planted experiment.\n\nIt counts.")
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
    text = (tmp_path / PAGE).read_text()
    assert "| theory | the sum is 9 | 9 | **holds** |" in text
    assert "(../../results/planted/figure.svg)" in text and "It counts." in text
    assert "- planted: [planted](docs/report/planted.md)" in (tmp_path / "REPORT.md").read_text()
    assert write_report(tmp_path, "--check") == 0


def test_the_first_page_has_the_paper_and_our_aims_alone(experiment, tmp_path, monkeypatch):
    made = [
        Claim("TurboQuant, figure 4", "every needle", "7 of 8", "does not hold"),
        Claim("TurboQuant, figure 5", "a", "long", "holds", topic="recall", short="+0.1"),
        Claim("TurboQuant, figure 5", "b", "long", "undecided", topic="recall", short="-0.1"),
        Claim("our aim", "fast", "2 times", "holds", topic="speed", short="2 times"),
        Claim("our aim", "faster", "3 times", "missed", topic="speed", short="3 times"),
        Claim("our question", "KIVI finds every needle", "1 of 8", "does not hold"),
    ]
    monkeypatch.setattr(experiment, "claims", lambda rows: made)
    assert run(tmp_path) == 0
    assert write_report(tmp_path) == 0
    text = (tmp_path / "REPORT.md").read_text()
    link = "[planted](docs/report/planted.md)"
    assert f"| figure 4: every needle | 7 of 8 | **does not hold** | {link} |" in text
    assert f"| figure 5: recall | +0.1; -0.1 | 1 **holds**, 1 **undecided** | {link} |" in text
    assert f"| speed | 2 times | **holds** | {link} |" in text
    assert f"| speed | 3 times | **missed** | {link} |" in text
    assert "KIVI" not in text and "KIVI" in (tmp_path / PAGE).read_text()


def test_what_no_figure_draws_is_a_table(experiment, tmp_path, monkeypatch):
    monkeypatch.delattr(experiment, "figure")
    assert run(tmp_path, "--names", "a") == 0
    assert write_report(tmp_path) == 0
    text = (tmp_path / PAGE).read_text()
    assert "| name | value | extra |\n| --- | --- | --- |\n| a | 0.5 |  |" in text
    assert "figure.svg" not in text


def test_archives_and_results_of_no_experiment_are_named_and_held_to_their_digest(
    experiment, tmp_path
):
    assert run(tmp_path) == 0
    assert run(tmp_path, "--label", "before") == 0
    folder = tmp_path / "results/elsewhere"
    results.write(folder, [{"shape": "8 x 4", "ms": 0.5}], {}, None)
    assert write_report(tmp_path) == 0
    assert "`elsewhere`, `planted.before`" in (tmp_path / "REPORT.md").read_text()
    assert "before" not in (tmp_path / PAGE).read_text()
    (folder / "rows.csv").write_text("shape,ms\n8 x 4,0.4\n")
    assert write_report(tmp_path, "--check") == 1


def test_a_page_of_no_experiment_is_refused_and_goes(experiment, tmp_path, capsys):
    assert run(tmp_path) == 0
    assert write_report(tmp_path) == 0
    stray = tmp_path / "docs/report/gone.md"
    stray.write_text("gone")
    assert write_report(tmp_path, "--check") == 1
    assert "gone.md: of no experiment" in capsys.readouterr().err
    assert write_report(tmp_path) == 0
    assert not stray.exists()


def test_rows_that_are_yielded_are_kept_as_they_come_in_a_new_place_alone(
    experiment, tmp_path, monkeypatch, capsys
):
    def cut_short(config, track):
        yield {"name": "first", "value": 1.5}
        raise KeyboardInterrupt

    whole = experiment.run
    monkeypatch.setattr(experiment, "run", cut_short)
    assert run(tmp_path) == 130
    (found,) = results.find(tmp_path / "results", "planted")
    assert found.rows == [{"name": "first", "value": 1.5}] and found.intact
    assert write_report(tmp_path) == 0
    assert write_report(tmp_path, "--check") == 1
    assert "cut short" in capsys.readouterr().err
    monkeypatch.setattr(experiment, "run", lambda *given: iter(whole(*given)))
    assert run(tmp_path) == 0
    (found,) = results.find(tmp_path / "results", "planted")
    assert len(found.rows) == 6 and "unfinished" not in found.meta
    monkeypatch.setattr(experiment, "run", cut_short)
    assert run(tmp_path) == 130
    assert results.find(tmp_path / "results", "planted") == [found], "old results stay whole"


def test_flags_of_every_kind(experiment, tmp_path, capsys):
    @dataclass(frozen=True)
    class Flags:
        means: bool = option(False, "a switch")
        cases: str = option("all", "what", choices=("all", "few"))
        sweep: tuple[str, ...] = option((), "none as a rule")
        peer: str = option("", "a path", path=True)

    experiment.Config, experiment.SMOKE = Flags, Flags()
    experiment.run = lambda config, track: [{"value": 9, "seen": str(config)}]
    given = ["--means", "--cases", "few", "--sweep", "1;2", "3;4", "--peer", "/home/me/python"]
    assert run(tmp_path, *given) == 0
    (found,) = results.find(tmp_path / "results", "planted")
    assert "/home/me/python" in found.rows[0]["seen"]
    config = {"means": True, "cases": "few", "sweep": ["1;2", "3;4"], "peer": "python"}
    assert found.meta["config"] == config
    given[-1] = "python"
    assert found.meta["command"] == " ".join(["python -m experiments run planted", *given])
    with pytest.raises(SystemExit):
        run(tmp_path, "--cases", "many")


def test_what_needs_a_gpu_is_refused_without_one_and_listed(experiment, tmp_path, capsys):
    experiment.NEEDS = GPU
    assert run(tmp_path) == 1
    assert "expected an NVIDIA GPU" in capsys.readouterr().err
    assert command.main(["list"]) == 0
    assert "A planted experiment. Needs an NVIDIA GPU." in capsys.readouterr().out


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
    for path in (tmp_path / "REPORT.md", tmp_path / PAGE):
        text = path.read_text()
        path.write_text(text.replace("**holds**", "**missed**"))
        assert write_report(tmp_path, "--check") == 1
        path.write_text(text)
        assert write_report(tmp_path, "--check") == 0
    assert run(tmp_path, "--size", "4", "--force") == 0
    assert write_report(tmp_path, "--check") == 1


def test_check_draws_nothing_and_missing_figures_are_drawn(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "find_spec", lambda name: None)  # a machine without matplotlib
    assert run(tmp_path) == 0
    path = tmp_path / "results/planted/figure.svg"
    assert not path.exists()
    monkeypatch.undo()
    monkeypatch.setattr(command, "EXPERIMENTS", (experiment,))
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


def test_runs_elsewhere_are_added_and_never_lost(tmp_path, experiment, capsys):
    """Rows of the same keys are replaced, all others stay, every run is named."""
    experiment.KEYS = "model", "dtype"

    def write(folder, rows, command):
        meta = {"config": results.config_of(Config()), "command": command, "versions": {}}
        meta |= {"date": "today", "commit": "0", "device": "here"}
        results.write(folder, rows, meta, None)

    held, other = tmp_path / "results" / "planted", tmp_path / "elsewhere" / "planted"
    small, large = ({"model": m, "kind": "k", "value": 1.5} for m in ("small", "large"))
    half = small | {"dtype": "bfloat16"}
    write(held, [small], "first")
    for value in (2.0, 6.0):
        write(other, [row | {"value": value} for row in (large, half)], "second")
        assert command.main(["add", str(other), "--out", str(held.parent)]) == 0
    found = results.read(held)
    assert found.rows == [small, large | {"value": 6}, half | {"value": 6}] and found.intact
    assert found.meta["command"] == "first"
    assert [meta["command"] for meta in found.meta["added"]] == ["second"]
    assert write_report(tmp_path) == 0
    assert "`second`, today" in (tmp_path / PAGE).read_text()
    assert run(tmp_path) == 1
    assert "holds rows of other runs too" in capsys.readouterr().err
    del experiment.KEYS
    assert command.main(["add", str(other), "--out", str(held.parent)]) == 1
    assert "planted: got no KEYS" in capsys.readouterr().err
    experiment.KEYS = ("model",)
    (other / "rows.csv").write_text("altered")
    assert command.main(["add", str(other), "--out", str(held.parent)]) == 1


def test_keys_tell_the_committed_rows_apart():
    """Otherwise adding a run would drop rows that it did not repeat."""
    keyed = [experiment for experiment in EXPERIMENTS if hasattr(experiment, "KEYS")]
    assert len(keyed) >= 8
    for experiment in keyed:
        for found in results.find(results.COMMITTED, name_of(experiment)):
            keys = [tuple(row.get(key) for key in experiment.KEYS) for row in found.rows]
            assert len({*keys}) == len(keys), found.folder
