"""GGUF files against transformers' own reader of them, where torch and it are installed.

It reads neither biases of Llama nor scalings nor windows: those are held against the folder of the
same weights (`test_formats`), and folders against transformers (`test_reference`).
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.conftest import random_model
from turboquant_jax.models.checkpoint import load
from turboquant_jax.models.gguf_keys import ARCHITECTURES

pytestmark = pytest.mark.reference


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    return torch


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits(tmp_path, torch, tiny_config, gguf_tensors, write_gguf, forward, name):
    from transformers import AutoModelForCausalLM

    architecture = ARCHITECTURES[name]
    config = dataclasses.replace(
        tiny_config,
        # What transformers takes whatever the file says: 128, or hidden_size / heads.
        head_dim=128 if architecture.qk_norm else 8,
        rope_theta=500.0,
        qkv_bias=architecture.qkv_bias,
        qk_norm=architecture.qk_norm,
    )
    tensors = gguf_tensors(random_model(config), architecture.interleaved)
    path = write_gguf(tmp_path / "m.gguf", config, tensors, **{"general.architecture": name})
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    ).eval()
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 60))
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens)).logits.numpy()
    got = np.asarray(forward(load(path).model, jnp.asarray(tokens, jnp.int32)))
    assert np.std(expected) > 0.3
    assert np.abs(got - expected).max() < 1e-3 * np.abs(expected).max()
    np.testing.assert_array_equal(got.argmax(-1), expected.argmax(-1))
