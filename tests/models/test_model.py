"""The decoder against an independent numpy forward pass, and against itself token by token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from turboquant_jax.models.checkpoint import packaged_smollm2
from turboquant_jax.models.config import parameter_count
from turboquant_jax.models.gguf import open_gguf
from turboquant_jax.models.model import Llama, random_model, rms_norm, unstack
from turboquant_jax.models.presets import PRESETS

PROMPT = (
    "The tide had turned in 1842, and the keeper's daughter rowed out alone; "
    "nobody on the quay expected to see the small green boat again before the spring."
)
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def numpy_logits(weights, heads, kv_heads, theta, epsilon, tokens):
    """Llama as llama.cpp reads the file: raw rows, RoPE on the adjacent pairs (2i, 2i+1)."""
    hidden = weights["token_embd.weight"][tokens]
    length, layers = len(tokens), sum(name.endswith("attn_q.weight") for name in weights)
    dim = weights["blk.0.attn_q.weight"].shape[0] // heads
    angles = np.outer(np.arange(length), theta ** (-np.arange(0, dim, 2) / dim))
    mask = np.triu(np.full((length, length), -np.inf), 1)

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * weights[name]

    def rope(x):
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape).astype(np.float32)

    for i in range(layers):
        w = {name: weights[f"blk.{i}.{name}.weight"] for name in MATRICES}
        x = norm(hidden, f"blk.{i}.attn_norm.weight")
        q = rope((x @ w["attn_q"].T).reshape(length, heads, dim))
        k = rope((x @ w["attn_k"].T).reshape(length, kv_heads, dim))
        v = (x @ w["attn_v"].T).reshape(length, kv_heads, dim)
        out = []
        for head in range(heads):
            group = head // (heads // kv_heads)
            scores = q[:, head] @ k[:, group].T / np.sqrt(dim) + mask
            p = np.exp(scores - scores.max(-1, keepdims=True))
            out.append(p / p.sum(-1, keepdims=True) @ v[:, group])
        hidden = hidden + np.concatenate(out, -1) @ w["attn_output"].T
        x = norm(hidden, f"blk.{i}.ffn_norm.weight")
        gate = x @ w["ffn_gate"].T
        gated = gate / (1 + np.exp(-gate)) * (x @ w["ffn_up"].T)
        hidden = hidden + gated @ w["ffn_down"].T
    hidden = norm(hidden, "output_norm.weight")
    return hidden @ weights.get("output.weight", weights["token_embd.weight"]).T


def test_smollm2_equals_numpy_on_the_raw_rows(smollm2, forward):
    file = open_gguf(packaged_smollm2())
    weights = {name: file.read(name) for name in file.tensors}
    tokens = smollm2.tokenizer.encode(PROMPT)
    assert 30 <= len(tokens) <= 50
    expected = numpy_logits(weights, 9, 3, 100_000.0, 1e-5, tokens)
    got = forward(smollm2.model, jnp.array([tokens], jnp.int32))[0]
    np.testing.assert_allclose(got, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_tiny_equals_numpy(tiny, tiny_tied, gguf_tensors, forward, tied):
    model = tiny_tied if tied else tiny
    tokens = np.random.default_rng(0).integers(0, 97, 20)
    expected = numpy_logits(gguf_tensors(model), 4, 2, 10_000.0, 1e-5, tokens)
    got = forward(model, jnp.asarray(tokens, jnp.int32)[None])[0]
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=1e-5)


def test_bfloat16_parameters_mean_bfloat16_computation(tiny, past, empty):
    tokens = jnp.arange(10, dtype=jnp.int32)[None]
    seen = []

    def attend(state, layer, projection):
        seen.append({x.dtype for x in projection.heads()})
        return past.attend(state, layer, projection)

    @jax.jit
    def run(model):
        state = empty(tiny.config, 1, 10, model.norm[...].dtype)
        state = past.begin(state, jnp.full((1,), 10, jnp.int32), 10)
        hidden, state = model(tokens, tokens, state, attend)
        return hidden, model.logits(hidden), state.keys

    hidden, logits, keys = run(jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny))
    assert seen == [{jnp.dtype("bfloat16")}]  # traced once for all layers
    assert (hidden.dtype, keys.dtype, logits.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    exact, *_ = run(tiny)
    # 3 layers of rounding at 2**-9 relative
    error = jnp.linalg.norm(hidden.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
    assert 1e-4 < error < 0.03


def test_rms_norm_of_bfloat16_is_rounded_once():
    x = jnp.linspace(-3, 5, 64, dtype=jnp.bfloat16).reshape(1, 2, 32)
    weight = jnp.linspace(0.5, 2, 32, dtype=jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
    expected = (expected * np.asarray(weight, np.float64)).astype(jnp.bfloat16)
    got = rms_norm(x, weight, 1e-5)
    # float32 and float64 may fall on two sides of a rounding: half a unit in the last place
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(expected, np.float32), rtol=2**-8
    )


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_built_abstractly(name):
    model = nnx.eval_shape(lambda: Llama(PRESETS[name], nnx.Rngs(0)))
    leaves = jax.tree.leaves(model)
    assert sum(leaf.size for leaf in leaves) == parameter_count(PRESETS[name])
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}


def test_random_weights_keep_activations_of_order_one(tiny_config, forward):
    config = dataclasses.replace(tiny_config, hidden_size=256, intermediate_size=512, head_dim=64)
    model = jax.jit(lambda: Llama(config, nnx.Rngs(0), jnp.float32))()
    logits = forward(model, jnp.arange(20, dtype=jnp.int32)[None])
    assert 0.5 < float(jnp.std(logits)) < 2


def test_only_parameters_inside(tiny):
    assert {
        type(x) for x in jax.tree.leaves(tiny, is_leaf=lambda x: isinstance(x, nnx.Variable))
    } == {nnx.Param}
    assert not jax.tree.leaves(nnx.state(tiny, nnx.Not(nnx.Param)))


def test_layers_one_after_another_equal_the_scan(tiny, forward):
    tokens = jnp.arange(20, dtype=jnp.int32)[None]
    np.testing.assert_allclose(forward(unstack(tiny), tokens), forward(tiny, tokens), atol=1e-5)


def test_random_weights_are_the_same_stacked_or_not(tiny_config):
    stacked = random_model(tiny_config, 1, jnp.float32)
    listed = random_model(tiny_config, 1, jnp.float32, stacked=False)
    jax.tree.map(np.testing.assert_array_equal, listed, unstack(stacked))
