"""`turboquant-jax plan`: exact to the byte, for every kind of model; one line for bad input."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from rich.console import Console

from turboquant_jax import cache, cli
from turboquant_jax.cache.bytes import planned_bytes
from turboquant_jax.cli import plan, settings
from turboquant_jax.models.checkpoint import packaged_smollm2
from turboquant_jax.models.config import parameter_count
from turboquant_jax.models.presets import PRESETS
from turboquant_jax.models.rope import inverse_frequencies
from turboquant_jax.units import parse_memory

SMALL = "smollm2-135m"
HUGGING_FACE = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def config_of(row, window=128, sinks=4):
    model = PRESETS[SMALL]
    codecs = [cache.CodecConfig(bits) for bits in (row.bits_k, row.bits_v)]
    return cache.CacheConfig(
        model.num_layers,
        model.num_kv_heads,
        model.head_dim,
        *codecs,
        window=window,
        sinks=sinks,
        rope_frequencies=tuple(inverse_frequencies(model)),
    )


@pytest.mark.parametrize(("batch", "window"), [(1, 128), (3, 50)])
def test_one_token_more_would_not_fit(batch, window):
    memory = 290 * 10**6  # 269 MB of weights
    pairs = [(8, 8), (3, 2)]
    result = plan.plan(SMALL, f"{memory}B", batch, pairs, window=window, sinks=4)
    assert result.weight_bytes == 2 * parameter_count(PRESETS[SMALL])
    budget = memory - result.weight_bytes
    full, *rows = result.rows
    token = batch * 2 * 30 * 3 * 64 * 2
    assert full.tokens == budget // token and full.cache_bytes == full.tokens * token
    for row, pair in zip(rows, pairs, strict=True):
        assert (row.bits_k, row.bits_v) == pair
        config = config_of(row, window)
        assert row.cache_bytes == planned_bytes(config, batch, row.tokens).total <= budget
        assert planned_bytes(config, batch, row.tokens + 1).total > budget
        assert row.ratio == row.tokens / full.tokens > 1
    # and really allocated: the last row's cache
    state = jax.jit(lambda: cache.create(config, batch, row.tokens, key=jax.random.key(0)))()
    assert sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(state)) == row.cache_bytes


@pytest.mark.parametrize("sizes", ["tensor=3", "tensor=3,context=2"])
def test_on_a_mesh_every_device_has_the_memory(sizes, tmp_path):
    """A third of the heads and of the matrices; norms are everywhere."""
    flags = ["--model", SMALL, "--memory", "100MB", "--bits", "4", "--mesh", sizes]
    assert cli.main(["plan", *flags, "--json", str(tmp_path / "plan.json")]) == 0
    result = json.loads((tmp_path / "plan.json").read_text())
    norms = 576 * (2 * 30 + 1)
    matrices = parameter_count(PRESETS[SMALL]) - norms
    assert result["weight_bytes"] == 2 * (matrices // 3 + norms)
    budget = 100 * 10**6 - result["weight_bytes"]
    full, row = result["rows"][0], next(row for row in result["rows"] if row["bits_k"] == 4)
    assert full["tokens"] == budget // (2 * 30 * 64 * 2)
    assert 0 <= budget - row["cache_bytes"] < 4096 * row["bytes_per_token"] * 2
    shares = 2 if "context" in sizes else 1
    own = 30 * 2 * (32 + 2)  # a head's codes, and scales of 16 bits
    assert row["bytes_per_token"] * shares == pytest.approx(own, rel=2e-3)  # and page numbers


def test_a_sliding_window_that_fits_is_all_that_a_model_needs(capsys):
    """Mistral v0.1 sees 4,096 tokens: full precision keeps them, a cache its ring of blocks."""
    result = plan.plan("mistral-7b-v0.1", "20GB", 2, [(4, 4)], window=128, sinks=4)
    full, row = result.rows
    assert full.cache_bytes == 2 * 4096 * 2 * 32 * 8 * 128 * 2
    assert full.bytes_per_token == row.bytes_per_token == 0
    assert row.cache_bytes < full.cache_bytes / 3
    model = PRESETS["mistral-7b-v0.1"]
    ring = settings.cache_config(model, 4, 4, window=128, sinks=4)
    assert row.cache_bytes == planned_bytes(ring, 2, row.tokens).total
    plan.show(Console(width=120), result)
    assert capsys.readouterr().out.count(" any ") == 2
    tight = plan.plan("mistral-7b-v0.1", "15GB", 2, [(4, 4)], window=128, sinks=4).rows[0]
    assert 0 < tight.tokens < 4096 and tight.bytes_per_token == 2 * 32 * 8 * 128 * 2


def test_no_memory_beside_the_weights_means_no_tokens():
    weights = 2 * parameter_count(PRESETS[SMALL])
    result = plan.plan(SMALL, str(weights + 1000), 1, [(4, 4)], window=128, sinks=4)
    assert [(row.tokens, row.cache_bytes, row.ratio) for row in result.rows] == [(0, 0, None)] * 2


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GB", 24 * 10**9),
        ("24G", 24 * 10**9),
        ("24Gi", 24 * 2**30),
        ("24 gib", 24 * 2**30),
        ("1.5KiB", 1536),
        ("0.1TB", 10**11),
        ("12345", 12345),
        ("7B", 7),
        ("512 MB", 512 * 10**6),
    ],
)
def test_memory_in_both_kinds_of_units(text, count):
    assert parse_memory(text) == count


@pytest.mark.parametrize(
    "text", ["", "GB", "24gigs", "24i", "-3GB", "3iB", "nan", "0.5B", "1e9", "2 4GB"]
)
def test_memory_that_is_none(text):
    with pytest.raises(ValueError, match="memory must be"):
        parse_memory(text)


def test_every_source_of_a_model_says_the_same(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HUGGING_FACE))
    sources = [
        SMALL,
        "SmolLM2-135M",
        f"random:{SMALL}",
        str(tmp_path),
        str(tmp_path / "config.json"),
        str(packaged_smollm2()),
    ]
    plans = [plan.plan(s, "1GB", 1, [(4, 4)], window=128, sinks=4) for s in sources]
    assert len({p.rows for p in plans}) == 1
    assert len({(p.weight_bytes, p.max_position) for p in plans}) == 1


def test_llama_3_in_24_gigabytes(tmp_path, capsys):
    out = tmp_path / "plan.json"
    what = ["--model", "llama-3-8b", "--memory", "24GB", "--batch", "1"]
    bits = ["--bits", "2", "--bits-k", "3"]
    assert cli.main(["plan", *what, *bits, "--json", str(out)]) == 0
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    assert result["memory_bytes"] == 24 * 10**9 and result["weight_bytes"] == 2 * 8_030_261_248
    assert [(r["bits_k"], r["bits_v"]) for r in result["rows"]] == [
        (None, None), (8, 8), (4, 4), (3, 3), (3, 2), (2, 2)
    ]  # fmt: skip
    for row in result["rows"]:
        assert f"{row['tokens']:,}" in printed and f"{row['cache_bytes']:,}" in printed
    # 34, 50, 66 and 130 bytes a vector of 128 at 2, 3, 4 and 8 bits; 12 bytes of tables a block
    for row in result["rows"][1:]:
        vectors = 16 * (row["bits_k"] + row["bits_v"]) + 4
        assert row["bytes_per_token"] == 32 * 8 * vectors + 12 / 64


def test_a_head_dim_that_is_no_power_of_two(tmp_path, capsys):
    """The default rotation serves it, is named, and its bytes are those of the cache."""
    sizes = HUGGING_FACE | {"head_dim": 96}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    what = ["plan", "--model", str(tmp_path), "--memory", "2GB", "--json"]
    assert cli.main([*what, str(tmp_path / "plan.json")]) == 0
    assert "haar rotation" in " ".join(capsys.readouterr().out.split())
    result = json.loads((tmp_path / "plan.json").read_text())
    assert result["rotation"] == "haar"
    row = next(r for r in result["rows"] if r["bits_k"] == 4)
    codec = cache.CodecConfig(4, "haar")
    frequencies = (1.0,) * 48  # for their bytes
    config = cache.CacheConfig(
        30, 3, 96, codec, codec, window=128, sinks=4, rope_frequencies=frequencies
    )
    assert planned_bytes(config, 1, row["tokens"]).total == row["cache_bytes"]
    assert plan.plan(SMALL, "1GB", 1, [(4, 4)], window=128, sinks=4).rotation == "hadamard"


def test_fewer_weight_bits_leave_room():
    four = plan.plan(SMALL, "300MB", 1, [(4, 4)], window=128, sinks=4, weight_bits=4.5)
    assert four.weight_bytes == -(-parameter_count(PRESETS[SMALL]) * 9 // 16)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--memory", "24gigs"], "got '24gigs'"),
        (["--memory", "100MB"], "the weights of smollm2-135m take 269,030,016 bytes"),
        (["--model", "llama-9"], "llama-9: no such file"),
        (["--model", "{}/config.json"], "no such file"),
        (["--model", "{}/broken/config.json"], "config.json: Expecting"),
        (["--model", "{}/list"], "list/config.json: got a list, expected a JSON object"),
        (["--model", "{}/foreign.gguf"], "foreign.gguf: got magic"),
        (["--batch", "0"], "batch must be at least 1, got 0"),
        (["--bits", "9"], "got 9, expected between 1 and 8"),
        (["--window", "-1"], "window: got -1, expected at least 0"),
        (["--weight-bits", "0"], "weight bits must be above 0"),
        (["--weight-bits", "nan"], "weight bits must be above 0"),
        (["--json", "{}/no/where.json"], "no such folder"),
    ],
)
def test_bad_input_is_one_line(flags, says, tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    (tmp_path / "foreign.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    flags = [flag.format(tmp_path) for flag in flags]
    assert cli.main(["plan", "--model", SMALL, "--memory", "1GB", *flags]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("turboquant-jax: ") and said.err.count("\n") == 1
    assert says in said.err and not said.out


def test_no_device_is_touched():
    """With a platform that does not exist, whatever asks for a device fails."""
    code = (
        "import sys; from turboquant_jax import cli; "
        "sys.exit(cli.main(['plan', '--model', 'smollm2-135m', '--memory', '1GB']))"
    )
    environment = os.environ | {"JAX_PLATFORMS": "nowhere"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
