"""Weights into the decoder: both formats give the model back; what is wrong is named."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from turboquant_jax.models.gguf import open_gguf
from turboquant_jax.models.model import unstack
from turboquant_jax.models.safetensors import open_safetensors
from turboquant_jax.models.weights import (
    read_gguf,
    read_huggingface,
    unpermute,
)


def assert_same(got, expected):
    assert got.config == expected.config
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_unpermute_by_hand():
    """Two heads of four rows: rows 0 1 2 3 of a head are channels 0 2 1 3."""
    rows = np.arange(8)[:, None]
    assert unpermute(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("tied", [False, True])
def test_gguf(tmp_path, tiny, tiny_tied, gguf_tensors, write_gguf, tied):
    model = tiny_tied if tied else tiny
    path = write_gguf(tmp_path / "m.gguf", model.config, gguf_tensors(model))
    for stacked, expected in ((True, model), (False, unstack(model))):
        assert_same(read_gguf(model.config, open_gguf(path), jnp.float32, stacked), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_huggingface(tmp_path, tiny, tiny_tied, huggingface_tensors, tied):
    model = tiny_tied if tied else tiny
    tensors = huggingface_tensors(model)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(6, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    source = open_safetensors(tmp_path)
    for stacked, expected in ((True, model), (False, unstack(model))):
        got = read_huggingface(model.config, source, jnp.float32, stacked)
        assert_same(got, expected)


def test_dtypes_of_file_and_model_may_differ(tmp_path, tiny, huggingface_tensors):
    tensors = huggingface_tensors(tiny)
    tensors = {name: w.astype(ml_dtypes.bfloat16) for name, w in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny)
    source = open_safetensors(tmp_path)
    assert_same(read_huggingface(tiny.config, source, jnp.bfloat16), rounded)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)
    assert_same(read_huggingface(tiny.config, source, jnp.float32), wide)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("blk.1.attn_k.weight", None, r"got no tensor blk.1.attn_k.weight, .*shape \(24, 32\)"),
        ("output.weight", None, "got no tensor output.weight"),
        (
            "blk.1.attn_q.bias",
            np.zeros(48),
            r"unexpected tensor blk.1.attn_q.bias of shape \(48,\)",
        ),
        ("blk.3.ffn_up.weight", np.zeros((48, 32)), "unexpected tensor blk.3.ffn_up.weight"),
        ("blk.0.ffn_up.weight", np.zeros((32, 48)), r"got shape \(32, 48\), expected \(48, 32\)"),
        ("output_norm.weight", np.zeros((32, 1)), r"got shape \(32, 1\), expected \(32,\)"),
    ],
)
def test_missing_unexpected_and_wrongly_shaped(
    tmp_path, tiny, gguf_tensors, write_gguf, name, tensor, message
):
    tensors = gguf_tensors(tiny)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor.astype(np.float32)
    path = write_gguf(tmp_path / "m.gguf", tiny.config, tensors)
    with pytest.raises(ValueError, match=message) as caught:
        read_gguf(tiny.config, open_gguf(path), jnp.float32)
    assert str(path) in str(caught.value)


def test_a_tied_checkpoint_may_store_its_matrix_twice(
    tmp_path, tiny, tiny_tied, huggingface_tensors
):
    """Equal to the embedding it says nothing new; any other is refused."""
    tensors = huggingface_tensors(tiny_tied)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(
        read_huggingface(tiny_tied.config, open_safetensors(tmp_path), jnp.float32), tiny_tied
    )
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"unexpected tensor lm_head\.weight"):
        read_huggingface(tiny_tied.config, open_safetensors(tmp_path), jnp.float32)


NAMES = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"] + [
    f"model.layers.1.{name}.weight"
    for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("value", "dtype"), [(np.nan, "float32"), (np.inf, "bfloat16"), (-np.inf, "float16")]
)
def test_weights_that_are_not_finite_are_refused(
    tmp_path, tiny, huggingface_tensors, name, value, dtype
):
    tensors = huggingface_tensors(tiny)
    tensors[name] = tensors[name].copy()
    tensors[name].flat[-1] = value
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"tensor {name}: got NaN or infinity") as caught:
        read_huggingface(tiny.config, open_safetensors(tmp_path), dtype)
    assert str(tmp_path) in str(caught.value)


def test_weights_too_large_for_the_dtype_are_refused(tmp_path, tiny, huggingface_tensors):
    tensors = huggingface_tensors(tiny)
    norm = tensors["model.norm.weight"] = tensors["model.norm.weight"].copy()
    norm[3] = 65504.0  # the largest of float16
    save_file(tensors, tmp_path / "model.safetensors")
    read_huggingface(tiny.config, open_safetensors(tmp_path), jnp.float16)
    norm[3] = 70000.0
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight: got NaN or infinity as float16"):
        read_huggingface(tiny.config, open_safetensors(tmp_path), jnp.float16)
    read_huggingface(tiny.config, open_safetensors(tmp_path), jnp.bfloat16)


def test_so_are_those_of_a_gguf_file(tmp_path, tiny, gguf_tensors, write_gguf):
    tensors = gguf_tensors(tiny)
    tensors["blk.2.ffn_down.weight"] = np.full((32, 48), np.nan, np.float32)
    path = write_gguf(tmp_path / "m.gguf", tiny.config, tensors)
    with pytest.raises(ValueError, match=r"tensor blk\.2\.ffn_down\.weight: got NaN or infinity"):
        read_gguf(tiny.config, open_gguf(path), jnp.float32)


def test_sizes_that_no_file_has_are_refused_at_once(tmp_path, tiny, huggingface_tensors):
    save_file(huggingface_tensors(tiny), tmp_path / "model.safetensors")
    source = open_safetensors(tmp_path)
    for changes in ({"num_layers": 10**12}, {"vocab_size": 10**30}, {"num_heads": 2 * 10**20}):
        config = dataclasses.replace(tiny.config, **changes)
        with pytest.raises(ValueError, match="expected"):
            read_huggingface(config, source, jnp.float32, stacked=False)
