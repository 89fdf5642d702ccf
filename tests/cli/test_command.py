"""The command: its one real run, and one clear line for every bad input."""

import csv
import dataclasses
import json
from functools import partial
from typing import get_args

import jax
import numpy as np
import pytest
from scipy import special, stats

from turboquant_jax import cache, cli
from turboquant_jax.cache import load_calibration, presets
from turboquant_jax.cli import demonstration, parsers, settings
from turboquant_jax.models import PRESETS
from turboquant_jax.models.checkpoint import packaged_smollm2
from turboquant_jax.models.rope import inverse_frequencies
from turboquant_jax.quantizers.bounds import lloyd_max_distortion


def test_demo_measures_what_it_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(settings, "TABLE_BITS", (2,))
    few = partial(demonstration.theory_row, vectors=2000)
    monkeypatch.setattr(demonstration, "theory_row", few)
    passes = []  # every pass over the text: the model, the tokens and the final hidden vectors

    def kept(run, model, tokens, *rest):
        passes.append((model, tokens, run(model, tokens, *rest)))
        return passes[-1][-1]

    for made in ("exact_hidden", "compressed_hidden"):
        measured = partial(kept, getattr(demonstration, made))
        monkeypatch.setattr(demonstration, made, measured)
    out = tmp_path / "demo.json"
    flags = ["--bits-k", "5", "--bits-v", "4", "--tokens", "3", "--context", "200"]
    # the passage of its own prompt is read four times, in programs that are not optimised
    assert len(demonstration.default_prompt().split()) > 90
    flags += ["--prompt", "Which book?"]
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
    assert len(passes) == 4  # without a cache, then those of the three rows
    exact, other = (log_probabilities(model, hidden) for model, _, hidden in passes[::3])
    nll = -np.take_along_axis(other, np.asarray(passes[0][1])[0, 1:, None], axis=1)
    assert two["perplexity"] == pytest.approx(np.exp(nll.mean()), rel=1e-4)
    kl = stats.entropy(np.exp(exact), np.exp(other), axis=1).mean()
    assert two["kl"] == pytest.approx(kl, rel=1e-3, abs=2e-6)
    assert two["top1_agreement"] == np.mean(exact.argmax(1) == other.argmax(1))
    assert full["perplexity"] < 60
    assert full["kl"] < five["kl"] < two["kl"]
    for row in result["theory"]:
        assert row["lloyd_max"] == lloyd_max_distortion(row["bits"], 64)
        assert abs(row["measured"] - row["lloyd_max"]) < 5 * row["standard_error"]


def log_probabilities(model, hidden):
    """Of each token after one of the text but the last, float64, with the tied embedding."""
    matrix = np.asarray(model.embedding[...], np.float64)
    return special.log_softmax(np.asarray(hidden, np.float64)[0, :-1] @ matrix.T, axis=1)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("broken")
    with packaged_smollm2().open("rb") as whole:
        (tmp_path / "truncated.gguf").write_bytes(whole.read(20 * 2**20))
    (tmp_path / "foreign.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    (tmp_path / "binary.txt").write_bytes(bytes(range(128, 256)))
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--bits", "9"], "key.bits: got 9, expected between 1 and 8"),
        (["--bits-v", "0"], "value.bits: got 0, expected between 1 and 8"),
        (["--preset", "max", "--bits-v", "3"], "--preset max says the bits, got --bits-v beside"),
        (["--window", "-1"], "window: got -1, expected at least 0"),
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


def test_an_answer_that_does_not_fit_is_refused(folder, capsys):
    assert cli.main(["demo", "--model", str(folder()), "--tokens", "9000"]) == 2
    error = capsys.readouterr().err
    assert "the answer up to 9000, expected at most" in error
    assert error.count("\n") == 1


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
    first, second = (
        demonstration.theory_row(3, 64, "haar", seed=1, vectors=2000) for _ in range(2)
    )
    assert first == second
    np.testing.assert_allclose(first["measured"], lloyd_max_distortion(3, 64), rtol=0.02)


def test_a_prompt_of_a_file_draws_what_it_would_alone(tiny, tmp_path, capsys):
    """And streaming prints what generating in one go does."""
    (tmp_path / "prompts.txt").write_text("one\n\nand another\n")
    out = tmp_path / "answers.json"
    flags = ["--model", tiny, "--tokens", "8", "--temperature", "1", "--json", str(out)]
    prompts = ["--prompts", str(tmp_path / "prompts.txt"), "--seed", "4"]
    assert cli.main(["generate", *prompts, *flags]) == 0
    first, second = json.loads(out.read_text())["answers"]
    assert capsys.readouterr().out == f"> one\n{first['text']}\n> and another\n{second['text']}\n"
    alone = ["and another", "--stream", "--seed", "5", "--chunk", "4", "--bits", "16"]
    assert cli.main(["generate", *alone, *flags]) == 0
    (streamed,) = json.loads(out.read_text())["answers"]
    assert streamed["tokens"] == second["tokens"] != first["tokens"]
    assert capsys.readouterr().out.strip() == second["text"]


def test_samples_are_the_answers_to_so_many_prompts(tiny, tmp_path, capsys):
    """Row by row, though the prompt is read once."""
    prompt, out = "one prompt of some words " * 4, tmp_path / "answers.json"
    (tmp_path / "prompts.txt").write_text(f"{prompt.strip()}\n" * 3)
    flags = ["--model", tiny, "--tokens", "20", "--window", "16", "--temperature", "1"]
    flags = ["generate", *flags, "--seed", "4", "--json", str(out)]
    assert cli.main([*flags, "--prompts", str(tmp_path / "prompts.txt")]) == 0
    apart = json.loads(out.read_text())["answers"]
    capsys.readouterr()
    assert cli.main([*flags, prompt.strip(), "--samples", "3"]) == 0
    found = json.loads(out.read_text())["answers"]
    assert [(row["tokens"], row["seed"]) for row in found] == [
        (row["tokens"], row["seed"]) for row in apart
    ]
    assert len({tuple(row["tokens"]) for row in found}) == 3
    printed = "".join(f"> seed {4 + i}\n{row['text']}\n" for i, row in enumerate(found))
    assert capsys.readouterr().out == printed


def test_drafts_change_no_answer_and_are_counted(tiny, tmp_path, capsys):
    """By look-up and by a second model, with a compressed and with a dense cache."""
    out = tmp_path / "answers.json"
    (tmp_path / "prompts.txt").write_text("again and again and again\nonce\n")
    flags = ["--prompts", str(tmp_path / "prompts.txt"), "--model", tiny, "--json", str(out)]
    flags = ["generate", *flags, "--tokens", "40", "--window", "16"]

    def answers(*more):
        assert cli.main([*flags, *more]) == 0
        found = json.loads(out.read_text())
        return [row["tokens"] for row in found["answers"]], found["speculation"]

    plain, nothing = answers()
    assert nothing is None
    capsys.readouterr()
    for more, name, tokens in (
        (["--speculate", "ngram:6"], "ngram", 6),
        (["--draft", tiny, "--bits", "16"], tiny, 4),
    ):
        found, took = answers(*more)
        exact = answers("--bits", "16")[0] if "16" in more else plain
        assert found == exact
        assert took["draft"] == name and took["tokens"] == tokens
        counts = np.array([len(row) for row in found])
        for number, row in enumerate(counts):
            assert row - 1 - took["accepted"][number] <= took["passes"][number] < row
        assert f"{sum(took['accepted'])} of {sum(took['drafted'])}" in capsys.readouterr().err
    assert took["accepted"] == took["drafted"], "the model agrees with itself"


def test_bench_writes_what_it_measures(tiny, tmp_path, capsys):
    files = [tmp_path / name for name in ("rows.csv", "rows.svg", "rows.json")]
    flags = ["--context", "100", "--steps", "2", "--repeats", "1", "--bits", "3"]
    outputs = [f"--{n}={file}" for n, file in zip(("csv", "plot", "json"), files, strict=True)]
    assert cli.main(["bench", "--model", tiny, "--batch", "2", *flags, *outputs]) == 0
    assert "2 x 100" in capsys.readouterr().out
    result = json.loads(files[2].read_text())
    rows = result["rows"]
    cases = [(row["phase"], row["bits_k"]) for row in rows]
    assert cases == [("decode", 16), ("prefill", 16), ("decode", 3), ("prefill", 3)]
    for row in rows:
        tokens = 2 if row["phase"] == "decode" else 2 * 100
        rate = tokens / (row["milliseconds"] / 1e3)
        assert row["tokens_per_second"] == pytest.approx(rate)
        assert (row["fraction_of_roofline"] is None) == (row["phase"] == "prefill")
    base = rows[0]["tokens_per_second"]
    assert rows[2]["ratio"] == pytest.approx(rows[2]["tokens_per_second"] / base)
    # float32 embedding, projections, feed-forward and norms; and bfloat16 keys and values of two
    # sequences, of which a step sees 101 tokens on average
    weights = 4 * (300 * 32 + 32 * (4 + 2 + 2 + 4) * 16 + 3 * 32 * 48 + 3 * 32)
    past = 2 * 101 * 2 * 2 * 16 * 2
    for row in rows[::2]:  # the window of the compressed one has not let go of a token
        moved = row["fraction_of_roofline"] * row["milliseconds"] / 1e3 * result["copy_bandwidth"]
        assert moved == pytest.approx(weights + past)
    # two sequences, bfloat16 keys and values of 2 heads of 16, and 9 numbers a sequence
    assert rows[1]["cache_bytes"] == 2 * (100 * 2 * 2 * 16 * 2 + 9)
    with files[0].open() as file:
        assert [line["phase"] for line in csv.DictReader(file)] == [c[0] for c in cases]
    assert files[1].read_text().startswith("<?xml")


@pytest.mark.parametrize("command", ["generate", "plan", "demo"])
@pytest.mark.parametrize("name", get_args(presets.Preset))
def test_a_preset_is_the_library_s(command, name):
    given = {"generate": ["x"], "plan": ["--model", "m", "--memory", "1GB"], "demo": []}[command]
    parse = parsers.build().parse_args
    arguments = parse([command, *given, "--preset", name])
    bits, options = settings.asked_bits(arguments), settings.segments(arguments, 64)
    sizes = dataclasses.replace(PRESETS["llama-3-8b"], num_layers=1, num_kv_heads=2, head_dim=64)
    expected = cache.preset(name, 1, 2, 64, tuple(inverse_frequencies(sizes)))
    assert settings.cache_config(sizes, *bits, code=settings.code(arguments), **options) == expected
    assert settings.table(arguments)[bits] == expected.key.code
    shorter = parse([command, *given, "--preset", name, "--window", "32"])
    assert settings.segments(shorter)["window"] == 32, "what is said counts"
    beside = parse([command, *given, "--preset", name, "--calibration", "file"])
    assert settings.segments(beside)["window"] == (256 if name == "max" else 128)


@pytest.mark.parametrize("name", get_args(presets.Preset))
def test_generate_makes_the_cache_of_the_preset(name):
    arguments = parsers.build().parse_args(["generate", "x", "--preset", name])
    sizes = dataclasses.replace(PRESETS["llama-3-8b"], num_layers=1, num_kv_heads=2, head_dim=64)
    state = jax.eval_shape(lambda: settings.empty_past(arguments, sizes, 1, 200)[0])
    frequencies = tuple(inverse_frequencies(sizes))
    assert state.config == cache.preset(name, 1, 2, 64, frequencies)


@pytest.mark.parametrize(("said", "centred"), [("stored", True), ("none", False)])
def test_another_centring_can_be_asked_for(said, centred):
    arguments = parsers.build().parse_args(["generate", "x", "--centring", said])
    state = jax.eval_shape(lambda: settings.empty_past(arguments, PRESETS["llama-2-7b"], 1, 9)[0])
    assert state.config.center_keys == centred and state.config.rope_frequencies is None


def test_the_cache_has_the_window_of_the_model():
    arguments = parsers.build().parse_args(["generate", "x"])
    sizes = dataclasses.replace(PRESETS["mistral-7b-v0.1"], num_layers=1, num_kv_heads=2)
    state = jax.eval_shape(lambda: settings.empty_past(arguments, sizes, 1, 200)[0])
    assert state.config.sliding_window == 4096


def test_generate_and_bench_take_a_preset(tiny, tmp_path, capsys):
    out = tmp_path / "out.json"
    given = ["--model", tiny, "--preset", "compact", "--json", str(out)]
    assert cli.main(["generate", "x", "--tokens", "3", *given]) == 0
    assert json.loads(out.read_text())["bits"] == [3, 2]
    sizes = ["--context", "200", "--steps", "2", "--repeats", "1"]
    assert cli.main(["bench", *sizes, *given]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["bits_k"], row["bits_v"]) for row in rows] == [(16, 16)] * 2 + [(3, 2)] * 2


def test_generate_and_bench_take_bits_of_each_layer(tiny, tmp_path, capsys):
    out, path = tmp_path / "out.json", tmp_path / "bits.json"
    path.write_text('{"keys": [3], "values": [2]}')
    given = ["--model", tiny, "--json", str(out)]
    given += ["--allocation", str(path)]
    assert cli.main(["generate", "x", "--tokens", "3", *given]) == 0
    assert json.loads(out.read_text())["bits"] == {"keys": [3], "values": [2]}
    path.write_text('{"keys": [3], "values": [2], "code": "prod"}')
    sizes = ["--context", "200", "--steps", "2", "--repeats", "1"]
    assert cli.main(["bench", *sizes, *given]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["bits_k"], row["bits_v"]) for row in rows] == [(16, 16)] * 2 + [(3, 2)] * 2
    assert "K 3, V 2" in capsys.readouterr().out
    path.write_text('{"keys": [3, 1], "values": [2, 4], "code": "trellis"}')
    assert settings.allocation(path) == (cache.Allocation((3, 1), (2, 4)), "trellis")


def test_what_calibrate_wrote_is_taken_and_held_against_the_model(
    tiny, tmp_path, capsys, monkeypatch
):
    text, path, out = (tmp_path / name for name in ("text", "tiny.safetensors", "out.json"))
    text.write_bytes(np.random.default_rng(0).integers(97, 122, 700, np.uint8).tobytes())
    given = ["--text", str(text), "--context", "200", "--windows", "2", "--capacity", "4096"]
    asked = ["calibrate", tiny, *given, "--ratio", "4.5", "--out", str(path), "--json", str(out)]
    assert cli.main([*asked, "--code", "scalar"]) == 0
    found = json.loads(out.read_text())
    assert dict(found["codec"])["code"] == "scalar"
    assert "4.5 times at 4,096 tokens" in capsys.readouterr().out.replace("\n", " ")
    assert [name for name, *_ in found["texts"]] == [str(text)]
    given = ["--json", str(out), "--calibration", str(path)]
    assert cli.main(["generate", "x", "--tokens", "3", "--model", tiny, *given]) == 0
    assert json.loads(out.read_text())["bits"] == found["allocation"]
    assert cli.main(["plan", "--model", "tiny", "--memory", "1MB", *given]) == 0
    row = json.loads(out.read_text())["rows"][1]
    keys, values = load_calibration(path).study.allocation.means
    assert (row["bits_k"], row["bits_v"]) == (keys, values)
    # in the bytes of a preset
    assert (
        cli.main(["plan", "--model", "tiny", "--memory", "1MB", "--preset", "compact", *given]) == 0
    )
    row, *others = json.loads(out.read_text())["rows"][1:]
    (uniform,) = (other for other in others if (other["bits_k"], other["bits_v"]) == (3, 2))
    assert row["bits_k"] + row["bits_v"] <= 5
    assert row["bytes_per_token"] <= uniform["bytes_per_token"]
    capsys.readouterr()

    def refused(*arguments):
        assert cli.main([*arguments, "--calibration", str(path)]) == 2
        return capsys.readouterr().err

    generate = ["generate", "x", "--model", tiny]
    assert "expected pre_rope, which the bases" in refused(*generate, "--centring", "none")
    assert "says the bits, got --bits" in refused(*generate, "--bits", "3")
    sizes = dataclasses.replace(PRESETS["tiny"], num_kv_heads=4)
    monkeypatch.setitem(PRESETS, "tiny", sizes)
    assert "got (1, 2, 16) layers, heads and channels, expected" in refused(*generate)
    assert "expected (1, 4, 16)" in refused("plan", "--model", "tiny", "--memory", "1MB")


@pytest.mark.parametrize(
    ("text", "beside", "says"),
    [
        ("{", [], "Expecting property name"),
        ("[3, 2]", [], "expected an object of keys, values"),
        ('{"keys": [3]}', [], "expected an object of keys, values"),
        ('{"keys": [3], "values": [2], "bits": 3}', [], "expected an object of keys, values"),
        ('{"keys": 3, "values": [2]}', [], "expected lists"),
        ('{"keys": [9], "values": [2]}', [], "got 9 for the keys of layer 0"),
        ('{"keys": [3], "values": [2.5]}', [], "got 2.5 for the values of layer 0"),
        ('{"keys": [3, 3], "values": [2, 2]}', [], "got bits of 2 layers, expected 1"),
        ('{"keys": [3], "values": [2], "code": "x"}', [], "one of scalar, trellis, prod, got"),
        ('{"keys": [3], "values": [2]}', ["--preset", "max"], "says the bits, got --preset"),
        ('{"keys": [3], "values": [2]}', ["--bits", "4"], "says the bits, got --bits beside"),
        (None, [], "no such file, expected bits of each layer"),
    ],
)
@pytest.mark.parametrize("command", [["generate", "x"], ["bench"]])
def test_bits_of_each_layer_that_cannot_be(command, text, beside, says, tiny, tmp_path, capsys):
    path = tmp_path / "bits.json"
    if text is not None:
        path.write_text(text)
    given = ["--allocation", str(path), "--model", tiny, *beside]
    assert cli.main([*command, *given]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "x", "--model", "random:nothing"], "expected one of llama-2-7b"),
        (["generate", "x", "--tokens", "0"], "--tokens must be at least 1"),
        (["generate", "x", "--speculate", "beams"], "expected ngram or model"),
        (["generate", "x", "--speculate", "ngram:8"], "got 8 tokens of a draft, expected 1 to 7"),
        (["generate", "x", "--speculate", "model"], "expected --draft"),
        (["generate", "x", "--speculate", "ngram", "--draft", "y"], "got --draft beside it"),
        (["generate", "x", "--speculate", "ngram", "--stream"], "got --stream beside them"),
        (["generate", "x", "--draft", "nowhere.gguf"], "no such file"),
        (["generate", "--prompts", "nowhere.txt"], "expected a prompt a line"),
        (["generate", "--prompts", "{}", "--stream"], "got --prompts with many"),
        (["generate", "--prompts", "{}"], "got no prompt"),
        (["generate", "x", "--samples", "0"], "--samples must be at least 1"),
        (["generate", "x", "--samples", "2"], "expected a --temperature above 0"),
        (["generate", "x", "--samples", "2", "--stream"], "got --stream beside it"),
        (
            ["generate", "x", "--samples", "2", "--temperature", "1", "--bits", "16"],
            "got 16 bits, expected a compressed cache",
        ),
        (["generate", "x", "--top-p", "2"], "top_p: got 2.0"),
        (["generate", "x", "--model", "random:tiny", "--tokens", "300"], "at most 256"),
        (
            ["generate", "x", "--model", "random:tiny", "--bits", "9"],
            "bits: got 9, expected between",
        ),
        (["generate", "x", "--preset", "max", "--bits", "4"], "says the bits, got --bits beside"),
        (["bench", "--preset", "max", "--bits", "4"], "says the bits, got --bits beside"),
        (["bench", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["bench", "--csv", "nowhere/rows.csv"], "no such folder"),
    ],
)
def test_bad_input_of_the_others_is_one_line_too(arguments, says, tiny, tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    arguments = [part.format(tmp_path / "empty.txt") for part in arguments]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
