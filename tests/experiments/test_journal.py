"""A run that was cut short goes on where it stopped, and stops when its time is over."""

from dataclasses import dataclass

import numpy as np

from experiments.fidelity import losses
from experiments.harness import journal
from experiments.harness.statistics import wilson
from experiments.tasks import answers
from experiments.tasks.prompts import Prompts
from experiments.tasks.questions import choices


@dataclass(frozen=True)
class Config:
    size: int = 1
    seconds: float = 0.0


def test_rows_are_kept_by_configuration(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(journal.FOLDER, str(tmp_path))
    first = journal.open_journal("x", Config())
    assert first.measure("a", lambda: [{"v": 1}]) == [{"v": 1}]
    with first.path.open("a") as file:
        file.write('{"case": "b", "ro')  # killed while writing
    again = journal.open_journal("x", Config(seconds=9.0))
    assert again.measure("a", lambda: 1 / 0) == [{"v": 1}]
    assert again.measure("b", lambda: [{"v": 2}]) == [{"v": 2}]
    assert journal.open_journal("x", Config(size=2)).held == {}
    chosen = journal.open_journal("x", Config(), ["size"])
    chosen.measure("c", lambda: [{"v": 3}])
    assert list(journal.open_journal("x", Config(size=2), ["size"]).held) == ["c"]
    assert "a: 0.0 s" in capsys.readouterr().err


def test_no_case_is_begun_when_its_share_of_the_time_is_over(monkeypatch):
    monkeypatch.delenv(journal.FOLDER, raising=False)
    held = journal.open_journal("x", Config(seconds=100.0))
    now = held.start + 50
    monkeypatch.setattr(journal.time, "monotonic", lambda: now)
    assert held.path is None
    assert held.measure("a", lambda: [{}], share=0.4) == []
    assert held.measure("a", lambda: [{}], share=0.6) == [{}]


def test_errors_are_of_chunks_and_seeds():
    rng = np.random.default_rng(0)
    chunk, seed = rng.normal(0, 3, (1, 40, 1)), rng.normal(0, 2, (30, 1, 1))
    kl = 5 + chunk + seed + np.zeros((30, 40, 10))
    made = losses.Losses(np.zeros((40, 10)), kl * 0, kl, kl * 0, None).columns()
    expected = np.sqrt(chunk.var(ddof=1) / 40 + seed.var(ddof=1) / 30)
    np.testing.assert_allclose(made["kl_se"], expected)
    np.testing.assert_allclose(made["kl"], kl.mean())
    assert made["perplexity_change"] == 0 and "attention_error" not in made


def test_the_ending_of_the_least_loss_per_character_is_chosen():
    valid = np.array([[True, True], [True, False], [True, True], [True, False]])
    nll = np.array([[1.0, 1.0], [1.5, 99.0], [4.0, 4.0], [1.0, 99.0]])
    made = answers.Answers(valid, nll, valid, valid, nll)
    labels = {"case": np.array([0, 0, 7, 7]), "ending": np.array([0, 1, 0, 1])}
    labels |= {"correct": np.array([1, 0, 1, 0]), "letters": np.array([10, 5, 2, 4])}
    empty = np.zeros(4, np.int32)
    chosen, wanted = choices(Prompts(np.zeros((4, 2), np.int32), empty, empty, labels), made)
    assert chosen.tolist() == [0, 1] and wanted.tolist() == [0, 0]
    assert made.total().tolist() == [2.0, 1.5, 8.0, 1.0]


def test_wilson_of_a_textbook():
    # 10 of 20 at 95 %: Agresti and Coull 1998
    np.testing.assert_allclose(wilson(10, 20), (0.299, 0.701), atol=5e-4)
    np.testing.assert_allclose((wilson(0, 10)[0], wilson(10, 10)[1]), (0, 1), atol=1e-9)
