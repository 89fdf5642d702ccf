"""The command: its one real run, and one clear line for every bad input."""

import json

import numpy as np
import pytest

from turboquant_jax import cli
from turboquant_jax.bounds import lloyd_max_distortion
from turboquant_jax.llama.checkpoint import packaged_smollm2


def test_demo_measures_what_it_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "TABLE_BITS", (2,))
    out = tmp_path / "demo.json"
    flags = ["--bits-k", "5", "--bits-v", "4", "--tokens", "3", "--context", "200"]
    assert cli.main(["demo", *flags, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert "K 5, V 4 bits" in printed
    for answer in result["answers"]:
        assert answer["text"] and answer["text"] in printed
        assert answer["tokens"] == 3
    full, five, two = result["cache"]
    assert (five["bits_k"], five["bits_v"], two["bits_k"]) == (5, 4, 2)
    # 30 layers, 3 heads of 64, bfloat16 keys and values
    assert full["bytes_per_token_long"] == 2 * 30 * 3 * 64 * 2
    codes_and_scales = 30 * 3 * (64 * 9 / 8 + 4)
    assert five["bytes_per_token_long"] == pytest.approx(codes_and_scales, rel=2e-4)
    assert full["perplexity"] < 60
    assert 0 < full["kl"] < five["kl"] < two["kl"]
    for row in result["theory"]:
        assert row["lloyd_max"] == lloyd_max_distortion(row["bits"], 64)
        assert abs(row["measured"] - row["lloyd_max"]) < 5 * row["standard_error"]


@pytest.fixture
def broken(tmp_path):
    whole = packaged_smollm2().read_bytes()
    (tmp_path / "truncated.gguf").write_bytes(whole[: 20 * 2**20])
    (tmp_path / "foreign.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    (tmp_path / "binary.txt").write_bytes(bytes(range(128, 256)))
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--bits", "9"], "between 1 and 8, got 9"),
        (["--bits-v", "0"], "between 1 and 8, got 0"),
        (["--window", "-1"], "window must be at least 0"),
        (["--tokens", "9000"], "at most 8192"),
        (["--context", "1"], "--context must be at least 2"),
        (["--text", "{}/missing.txt"], "no such file"),
        (["--text", "{}/binary.txt"], "expected UTF-8 text"),
        (["--model", "{}/missing.gguf"], "no such file"),
        (["--model", "{}/truncated.gguf"], "truncated.gguf"),
        (["--model", "{}/foreign.gguf"], "foreign.gguf"),
        (["--model", "{}/folder"], "config.json"),
        (["--json", "{}/nowhere/out.json"], "no such folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, says, broken, capsys):
    out = broken / "out.json"
    flags = [flag.format(broken) for flag in flags]
    flags += [] if "--json" in flags else ["--json", str(out)]
    assert cli.main(["demo", *flags]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not list(broken.glob("*.json"))


def test_unknown_rotation_is_refused_by_the_parser(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo", "--rotation", "givens"])
    assert stopped.value.code == 2
    assert "givens" in capsys.readouterr().err


def test_help_explains_itself(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    assert "demo" in capsys.readouterr().out


def test_results_are_reproducible_numbers():
    from turboquant_jax import demo

    first, second = (demo.theory_row(3, 64, "haar", seed=1, vectors=2000) for _ in range(2))
    assert first == second
    np.testing.assert_allclose(first["measured"], lloyd_max_distortion(3, 64), rtol=0.02)
