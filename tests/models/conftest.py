"""What the tests of the decoder share: a plain past, a small model, a small file, the real one."""

import dataclasses
import json
from typing import NamedTuple

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from turboquant_jax.models.checkpoint import Checkpoint, load
from turboquant_jax.models.config import LlamaConfig
from turboquant_jax.models.generate import Past
from turboquant_jax.models.model import Llama
from turboquant_jax.models.weights import GGUF_NAMES, HUGGINGFACE_NAMES

TINY = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,  # heads * head_dim is not hidden_size
    max_position=64,
    rope_theta=10_000.0,
    rms_norm_eps=1e-5,
    tie_embeddings=False,
    bos_id=1,
    eos_ids=(2,),
)


class Dense(NamedTuple):
    """Keys and values in full precision, [L, B, S, K, H]; tokens [B] there are and to come."""

    keys: jax.Array
    values: jax.Array
    lengths: jax.Array
    pending: jax.Array

    @classmethod
    def empty(cls, config, batch, size, dtype=jnp.float32):
        shape = (config.num_layers, batch, size, config.num_kv_heads, config.head_dim)
        none = jnp.zeros((batch,), jnp.int32)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), none, jnp.copy(none))


def dense_begin(state, counts, most):
    return state._replace(pending=counts)


def dense_attend(state, layer, projection):
    """Store the pending tokens, then attend to everything up to each query, in float32."""
    q, k, v = projection.heads()
    batch, tokens, heads, dim = q.shape
    size, kv_heads = state.keys.shape[2:4]
    steps = jnp.arange(tokens, dtype=jnp.int32)[None, :]
    positions = state.lengths[:, None] + steps
    slots = jnp.where(steps < state.pending[:, None], positions, size)  # beyond the end: dropped
    rows = jnp.broadcast_to(jnp.arange(batch)[:, None], slots.shape)
    state = state._replace(
        keys=state.keys.at[layer, rows, slots].set(k, mode="drop"),
        values=state.values.at[layer, rows, slots].set(v, mode="drop"),
    )
    grouped = q.reshape(batch, tokens, kv_heads, heads // kv_heads, dim).astype(jnp.float32)
    keys, values = (x[layer].astype(jnp.float32) for x in (state.keys, state.values))
    products = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, keys)
    scale, cap = projection.scores.scale, projection.scores.softcap
    scores = products * (dim**-0.5 if scale is None else scale)
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    distance = positions[:, :, None] - jnp.arange(size, dtype=jnp.int32)[None, None, :]
    seen = (distance >= 0) & (distance < (projection.sliding_window or size))
    scores = jnp.where(seen[:, None, None, :, :], scores, -1e30)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", jax.nn.softmax(scores, axis=-1), values)
    return out.reshape(q.shape).astype(q.dtype), state


def dense_commit(state):
    return state._replace(
        lengths=state.lengths + state.pending, pending=jnp.zeros_like(state.pending)
    )


@pytest.fixture(scope="session")
def empty():
    """`empty(config, batch, size, dtype)`: a full-precision state without tokens."""
    return Dense.empty


@pytest.fixture(scope="session")
def past():
    return Past(dense_begin, dense_attend, dense_commit)


@pytest.fixture(scope="session")
def tiny_config():
    return TINY


@pytest.fixture(scope="session")
def tiny():
    return random_model(TINY)


def random_model(config):
    """Random weights whose norms are not all one, so that forgetting a norm shows."""
    rng = np.random.default_rng(7)

    def draw(leaf):
        if leaf.shape[-1] == config.hidden_size and leaf.ndim <= 2 and leaf.size < 1000:
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        return jnp.asarray(rng.normal(0, config.hidden_size**-0.5, leaf.shape), leaf.dtype)

    return jax.tree.map(draw, nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0), jnp.float32)))


@pytest.fixture(scope="session")
def forward(past, empty):
    """`forward(model, tokens)`: float32 logits of every position, from one whole pass."""

    @jax.jit
    def run(model, tokens):
        batch, length = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], tokens.shape)
        state = empty(model.config, batch, length, model.embedding[...].dtype)
        state = past.begin(state, jnp.full((batch,), length, jnp.int32), length)
        hidden, _ = model(tokens, positions, state, past.attend)
        return model.logits(hidden)

    return run


@pytest.fixture(scope="session")
def smollm2() -> Checkpoint:
    """SmolLM2-135M-Instruct from the package, float32."""
    return load()


@pytest.fixture(scope="session")
def write_gguf():
    """`write_gguf(path, config, tensors, **metadata)` writes a GGUF file; None drops a key."""
    return _write_gguf


def _write_gguf(path, config, tensors, **changes):
    architecture = changes.pop("general.architecture", "llama")
    sizes = {
        "llama.block_count": config.num_layers,
        "llama.context_length": config.max_position,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_theta,
        "llama.rope.dimension_count": config.head_dim,
        "llama.vocab_size": config.vocab_size,
    }
    metadata = {key.replace("llama.", architecture + "."): size for key, size in sizes.items()}
    metadata |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["<end>", "<s>", "</s>", *map(chr, range(33, 126)), '!"'],
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * 94,
        "tokenizer.ggml.merges": ['! "'],
        "tokenizer.ggml.bos_token_id": config.bos_id,
        "tokenizer.ggml.eos_token_id": config.eos_ids[0],
    } | changes
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def gguf_tensors():
    """`gguf_tensors(model, interleaved)`: what a converter would write, float32 (out, in)."""
    return _gguf_tensors


def _gguf_tensors(model, interleaved=True):
    config, layers, qkv = model.config, model.layers, model.layers.qkv[...]
    tensors = {"token_embd.weight": model.embedding, "output_norm.weight": model.norm}
    if model.head is not None:
        tensors["output.weight"] = model.head
    parts = [
        ("attn_norm.weight", layers.attention_norm, 0),
        ("attn_q.weight", qkv[..., :-2, :], 1),
        ("attn_k.weight", qkv[..., -2, :], 1),
        ("attn_v.weight", qkv[..., -1, :], 1),
        ("attn_output.weight", layers.o, 2),
        ("ffn_norm.weight", layers.ffn_norm, 0),
        ("ffn_gate.weight", layers.gate_up[:, :, 0], 1),
        ("ffn_up.weight", layers.gate_up[:, :, 1], 1),
        ("ffn_down.weight", layers.down, 1),
    ]
    if layers.qkv_bias is not None:
        of_q, of_k, of_v = (layers.qkv_bias[:, :, x] for x in (slice(-2), -2, -1))
        parts += [("attn_q.bias", of_q, 0), ("attn_k.bias", of_k, 0), ("attn_v.bias", of_v, 0)]
    if layers.qk_norm is not None:
        parts += [(f"attn_{x}_norm.weight", layers.qk_norm[:, i], 0) for i, x in enumerate("qk")]
    if layers.o_bias is not None:
        parts += [("attn_output.bias", layers.o_bias, 0)]
    if layers.down_bias is not None:
        of_gate, of_up = layers.gate_up_bias[:, 0], layers.gate_up_bias[:, 1]
        parts += [("ffn_gate.bias", of_gate, 0), ("ffn_up.bias", of_up, 0)]
        parts += [("ffn_down.bias", layers.down_bias, 0)]
    for i in range(config.num_layers):
        for name, p, inputs in parts:
            w = np.asarray(p[i])
            w = w.reshape(int(np.prod(w.shape[:inputs])), -1).T if inputs else w.reshape(-1)
            if interleaved and name.split(".")[0] in ("attn_q", "attn_k"):
                half = config.head_dim // 2  # the halves of each head
                w = w.reshape(-1, 2, half, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
            tensors[f"blk.{i}.{name}"] = w
    return {k: np.ascontiguousarray(np.asarray(w[...], np.float32)) for k, w in tensors.items()}


@pytest.fixture(scope="session")
def huggingface_tensors():
    """`huggingface_tensors(model)`: the weights under the names and in the row order of there."""
    return _huggingface_tensors


def _huggingface_tensors(model):
    found, tensors = _gguf_tensors(model, interleaved=False), {}
    for matrix, name in GGUF_NAMES.items():
        for i in range(model.config.num_layers if "{}" in name else 1):
            if name.format(i) in found:
                tensors[HUGGINGFACE_NAMES[matrix].format(i)] = found[name.format(i)]
    return tensors


@pytest.fixture
def tiny_tied():
    return random_model(dataclasses.replace(TINY, tie_embeddings=True))


# config.json of `TINY`
TINY_ENTRIES = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture
def folder(tmp_path, tiny, huggingface_tensors):
    """The tiny model as a Hugging Face folder."""
    folder = tmp_path / "tiny-llama"
    folder.mkdir()
    save_file(huggingface_tensors(tiny), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(TINY_ENTRIES))
    Tokenizer(models.WordLevel({"a": 0, "?": 1}, "?")).save(str(folder / "tokenizer.json"))
    return folder
