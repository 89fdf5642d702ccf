"""Every architecture as a folder and as a GGUF file: the same decoder comes out of both."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from tests.models.conftest import TINY_ENTRIES, random_model
from turboquant_jax.cli.plan import read_model
from turboquant_jax.models.checkpoint import load
from turboquant_jax.models.rope_scaling import LinearScaling, YarnScaling, yarn_attention_factor

EXACT = dict(rms_norm_eps=2.0**-17, rope_theta=500.0)  # GGUF has float32
YARN = YarnScaling(4.0, 16, yarn_attention_factor(4.0), beta_fast=8.0)
YARN_ENTRIES = dict(
    rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=8.0
)
# Name -> the configuration, what `config.json` says of it, and what the metadata of GGUF say.
ARCHITECTURES = {
    "llama": (
        dict(qkv_bias=True, o_bias=True, mlp_bias=True, rope_scaling=LinearScaling(2.0)),
        dict(attention_bias=True, mlp_bias=True, rope_scaling=dict(type="linear", factor=2.0)),
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
    ),
    "mistral": (
        dict(sliding_window=24),
        dict(sliding_window=24),
        {"general.architecture": "llama", "llama.attention.sliding_window": 24},
    ),
    "qwen2": (
        dict(qkv_bias=True, rope_scaling=YARN, tie_embeddings=True),
        dict(rope_scaling=YARN_ENTRIES, tie_word_embeddings=True, head_dim=12),
        {
            "general.architecture": "qwen2",
            "qwen2.rope.scaling.type": "yarn",
            "qwen2.rope.scaling.factor": 4.0,
            "qwen2.rope.scaling.original_context_length": 16,
            "qwen2.rope.scaling.yarn_beta_fast": 8.0,
        },
    ),
    "qwen3": (
        dict(qk_norm=True, sliding_window=20),
        dict(use_sliding_window=True, sliding_window=20, max_window_layers=0),
        {"general.architecture": "qwen3", "qwen3.attention.sliding_window": 20},
    ),
    "qwen3 with biases": (
        dict(qk_norm=True, qkv_bias=True, o_bias=True),
        dict(attention_bias=True),
        {"general.architecture": "qwen3"},
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_both_formats(tmp_path, tiny_config, gguf_tensors, huggingface_tensors, write_gguf, name):
    fields, entries, metadata = ARCHITECTURES[name]
    config = dataclasses.replace(tiny_config, **EXACT, **fields)
    model = random_model(config)
    interleaved = metadata.get("general.architecture", "llama") == "llama"
    tensors = gguf_tensors(model, interleaved)
    path = write_gguf(tmp_path / "m.gguf", config, tensors, **metadata)
    from_file = load(path)
    assert read_model(str(path)) == config

    save_file(huggingface_tensors(model), tmp_path / "model.safetensors")
    Tokenizer(models.WordLevel({"a": 0, "?": 1}, "?")).save(str(tmp_path / "tokenizer.json"))
    kind = name.split()[0]
    whole = {**TINY_ENTRIES, **EXACT, "model_type": kind, "architectures": None, **entries}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    from_folder = load(tmp_path)

    for got in (from_file, from_folder):
        assert got.config == config
        assert jax.tree.structure(got.model) == jax.tree.structure(model)
        jax.tree.map(np.testing.assert_array_equal, got.model, model)
