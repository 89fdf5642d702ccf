"""Safetensors folders: one file, shards, and every way they can be wrong."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from turboquant_jax.models.safetensors import open_safetensors

A = np.arange(12, dtype=np.float32).reshape(3, 4)
B = np.linspace(-1, 1, 5).astype(ml_dtypes.bfloat16)


def shards(folder, weight_map=None):
    save_file({"a": A}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": B}, folder / "model-00002-of-00002.safetensors")
    weight_map = weight_map or {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
    }
    index = {"metadata": {"total_size": 58}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("sharded", [False, True])
def test_tensors_come_as_they_were_saved(tmp_path, sharded):
    if sharded:
        shards(tmp_path)
    else:
        save_file({"a": A, "b": B}, tmp_path / "model.safetensors")
    source = open_safetensors(tmp_path)
    assert source.shapes == {"a": (3, 4), "b": (5,)}
    for name, expected in (("a", A), ("b", B)):
        got = source.read(name)
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": A, "b": B}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"{path}: got .*, expected a whole safetensors file"):
            open_safetensors(tmp_path)


@pytest.mark.parametrize(
    "raw", [b"GGUF" + b"\0" * 96, b"\xff" * 99, b"\x09" + b"\0" * 7 + b"{" * 9]
)
def test_foreign_files_are_refused(tmp_path, raw):
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(ValueError, match="expected a whole safetensors file"):
        open_safetensors(tmp_path)


def test_integers_are_refused(tmp_path):
    save_file({"a": np.arange(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="tensor a: got I64, expected one of F64, F32, F16, BF16"):
        open_safetensors(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such file"):
        open_safetensors(tmp_path)
    (shards(tmp_path) / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002\.safetensors: no such file"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "[" * 10**5, "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../x"}}'],
    ids=range(7),
)
def test_bad_indices_are_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json: .*got .*, expected"):
        open_safetensors(tmp_path)


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path):
    one, two = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    shards(tmp_path, {"a": one, "b": two, "c": two})
    with pytest.raises(ValueError, match=f"tensor c: got no shard, expected {two} to hold it"):
        open_safetensors(tmp_path)
    shards(tmp_path, {"a": two, "b": one})
    with pytest.raises(ValueError, match=f"tensor a: got {one}, expected {two} to hold it"):
        open_safetensors(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    shards(tmp_path)
    save_file({"a": A, "b": B}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"got tensor a that .* holds too"):
        open_safetensors(tmp_path)
