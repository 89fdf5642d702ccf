"""Every experiment runs at its smoke size, and can judge and draw what it measured."""

import dataclasses

import pytest

from experiments import __main__ as command
from experiments.catalogue import EXPERIMENTS
from experiments.harness import results
from experiments.harness.experiment import name_of

by_name = pytest.mark.parametrize("experiment", EXPERIMENTS, ids=name_of)


@by_name
def test_smoke(experiment, tmp_path):
    assert command.main(["run", name_of(experiment), "--smoke", "--out", str(tmp_path)]) == 0
    (found,) = results.find(tmp_path, name_of(experiment))
    assert found.rows and found.intact
    assert experiment.claims(found.rows)
    assert isinstance(experiment.claims(found.rows[:1]), list), "part of the cases will do"
    assert (found.folder / "figure.svg").stat().st_size < 300_000


@by_name
def test_every_option_is_described(experiment):
    assert all(field.metadata["help"] for field in dataclasses.fields(experiment.Config))
    assert (experiment.__doc__ or "").partition("\n")[0].endswith(".")
