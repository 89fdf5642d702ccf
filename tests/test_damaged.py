"""Damaged files are read or refused in one line, never anything else."""

import pytest

from tests.damaged import KINDS, Kind


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_loaded_or_refused(kind, tmp_path):
    files = Kind(kind, tmp_path)
    files.read()
    outcomes = {seed: files.outcome(seed) for seed in range(150)}
    assert {s: o for s, o in outcomes.items() if o not in ("loaded", "refused")} == {}
    assert "refused" in outcomes.values()
