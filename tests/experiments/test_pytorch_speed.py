"""What `pytorch_speed` says of its rows, and what it measures before all others; without torch."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from experiments.harness.experiment import AIM
from experiments.harness.journal import Journal
from experiments.speed import pytorch_speed

CASE = {"batch": 8, "context": 32768}


def row(cache, milliseconds, fused=0):
    timed = {"milliseconds_per_step": milliseconds, "cache_bytes": 100}
    return {"cache": cache, "captured": 1, "fused": fused} | CASE | timed


def aims(rows):
    return [claim for claim in pytorch_speed.claims(rows) if claim.source == AIM]


@pytest.mark.parametrize(("own", "verdict"), [(9.9, "missed"), (10.1, "holds")])
def test_a_step_is_held_against_our_own_decoder_of_the_same_run(own, verdict):
    (claim,) = aims([row(pytorch_speed.OWN, own), row("4 bits", 11.0, fused=1)])
    assert claim.verdict == verdict
    assert f"11.00 ms against {own:.2f} ms" in claim.measured


def test_without_it_against_the_committed_rows():
    (claim,) = aims([row("4 bits", 11.0)])
    assert "11.00 ms against 9.14 ms" in claim.measured


def test_a_step_of_other_codes_is_not_held_against_that_of_4_bits():
    assert not aims([row(pytorch_speed.OWN, 10.0), row("balanced", 11.0)])


def test_our_own_decoder_is_measured_once_a_case(monkeypatch):
    """In a process of its own; of what a journal holds nothing is measured again."""
    asked = []

    def start(program, env, **options):
        asked.append(program[-2:])
        assert env["JAX_PLATFORMS"] == "cuda,cpu"
        found = {"case": "2x40", "copy": 1.0} | dict.fromkeys(pytorch_speed._SHARED, 2.0)
        words = ["W0000 a warning", json.dumps(found)]
        return subprocess.Popen(["echo", "\n".join(words)], **options)

    monkeypatch.setattr(pytorch_speed, "device", lambda: "NVIDIA H100")
    monkeypatch.setattr(pytorch_speed, "subprocess", SimpleNamespace(Popen=start, PIPE=-1))
    config, own = pytorch_speed.Config(("1x40", "2x40")), "{} our own decoder".format
    held = [row(pytorch_speed.OWN, 1.0)]
    journal = Journal(None, 0.0, float("inf"), {own("1x40"): held})
    pytorch_speed._measure_own(config, journal)
    assert asked == [["3", "2x40"]]
    assert journal.held[own("1x40")] is held
    (found,) = journal.held[own("2x40")]
    assert found["cache"] == pytorch_speed.OWN
    assert found["milliseconds_per_step"] == 2.0
    assert "copy" not in found
    pytorch_speed._measure_own(config, journal)
    assert len(asked) == 1


def test_our_own_decoder_is_ended_when_its_time_is_over(monkeypatch):
    """What it has measured by then stays."""
    row = json.dumps({"case": "1x40"} | dict.fromkeys(pytorch_speed._SHARED, 2.0))

    def start(program, env, **options):
        slow = f"import time; print({row!r}, flush=True); time.sleep(60)"
        return subprocess.Popen([sys.executable, "-c", slow], **options)

    monkeypatch.setattr(pytorch_speed, "device", lambda: "cpu")
    monkeypatch.setattr(pytorch_speed, "subprocess", SimpleNamespace(Popen=start, PIPE=-1))
    config = pytorch_speed.Config(("1x40", "2x40"), seconds=5.0)
    journal = Journal(None, time.monotonic(), 60.0)
    begin = time.monotonic()
    pytorch_speed._measure_own(config, journal)
    assert time.monotonic() - begin < 30
    assert list(journal.held) == ["1x40 our own decoder"]
