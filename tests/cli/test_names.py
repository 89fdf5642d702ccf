"""What users type for models, dtypes and choices: understood, or answered with what to type."""

from typing import get_args

import pytest

from turboquant_jax import cli
from turboquant_jax.cache import presets
from turboquant_jax.cli import choices, models
from turboquant_jax.models import rope
from turboquant_jax.quantizers import rotation


def test_choices_are_the_library_s():
    assert get_args(presets.Preset) == choices.PRESETS
    assert get_args(rotation.Kind) == choices.ROTATIONS
    assert get_args(rope.Centring) == choices.CENTRINGS


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("llama-3-8b", "expected random:llama-3-8b for random weights"),
        ("Llama-3-8B", "expected random:llama-3-8b for random weights"),
        ("meta-llama/Llama-3.1-8B", "hf download meta-llama/Llama-3.1-8B --local-dir"),
        ("llama-3-8", "no such file, .* such as random:llama-3-8b"),
        ("models/x.gguf", "no such file, expected a GGUF file, a Hugging Face folder, or random:"),
        ("random:llama-9", "expected one of llama-2-7b"),
        ("{}/pickled", "got weights in pytorch_model.bin alone"),
        ("{}/adapter", "got an adapter"),
        ("{}/ggufs", "got a folder of GGUF files, expected one, .*ggufs/a.gguf"),
    ],
)
def test_a_name_that_is_no_model_is_answered(name, says, tmp_path):
    files = {
        "pickled": ("config.json", "pytorch_model.bin"),
        "adapter": ("adapter_config.json", "adapter_model.safetensors"),
        "ggufs": ("b.gguf", "a.gguf"),
    }
    for folder, names in files.items():
        (tmp_path / folder).mkdir()
        for file in names:
            (tmp_path / folder / file).touch()
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        models.resolve(name.format(tmp_path))


def test_a_name_that_is_a_model_is_taken(tmp_path):
    assert models.resolve(None) is None
    assert models.resolve("random:Llama-3-8B") == "random:llama-3-8b"
    for file in ("config.json", "model.safetensors", "pytorch_model.bin", "adapter_config.json"):
        (tmp_path / file).touch()
    assert models.resolve(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("name", ["bf16", "BFloat16", "fp32", "float32"])
def test_dtypes_by_their_names(name):
    assert choices.dtype(name) == ("bfloat16" if "b" in name.lower() else "float32")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "x", "--dtype", "float16"], "got float16, expected float32 or bfloat16"),
        (["generate", "x", "--dtype", "int8"], "got int8, expected float32 or bfloat16"),
        (["generate"], "got nothing to answer"),
        (["generate", "x", "--prompts", "y"], "got prompt and prompts, expected one"),
        (["generate", "x", "--top-k", "5"], "top_k: got 5 with a temperature of 0"),
        (["generate", "x", "--stop", ""], "--stop: got an empty text"),
        (["generate", "x", "--plain", "--system", "y"], "got a conversation beside it"),
        (["generate", "x", "--save-cache", "f", "--bits", "16"], "for a compressed cache"),
        (["generate", "x", "--load-cache", "nowhere"], "expected a saved cache"),
        (["generate", "x", "--model", "a/b"], "hf download a/b"),
        (["chat", "--capacity", "0"], "--capacity must be at least 1"),
        (["chat", "--compile-cache", "/dev/null/x"], "expected a folder or off"),
        (["plan", "--model", "llama-3-8b", "--memory", "24"], "write 24GB for 24 x 10^9"),
    ],
)
def test_bad_flags_are_one_line(arguments, says, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
