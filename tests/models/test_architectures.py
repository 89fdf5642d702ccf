"""Each feature of an architecture against a numpy forward pass, and through the cache."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from turboquant_jax import cache
from turboquant_jax.cache import CacheConfig, CodecConfig
from turboquant_jax.models import dense
from turboquant_jax.models.decoding import read
from turboquant_jax.models.evaluate import compressed_hidden, exact_hidden
from turboquant_jax.models.folding import fold_value_rotation
from turboquant_jax.models.model import Llama, unstack
from turboquant_jax.models.past import COMPRESSED
from turboquant_jax.models.rope_scaling import LinearScaling, YarnScaling
from turboquant_jax.quantizers import rotation

LENGTH = 60
YARN = YarnScaling(4.0, 16, attention_factor=1.2, beta_fast=2.0, beta_slow=0.25)
FEATURES = {
    "biases, caps, scale, linear": dict(
        qkv_bias=True, o_bias=True, mlp_bias=True, attention_scale=0.4, attention_softcap=2.0,
        logit_softcap=3.0, rope_scaling=LinearScaling(4.0),
    ),
    "head norms, window, yarn": dict(
        qk_norm=True, sliding_window=21, rope_scaling=YARN, tie_embeddings=True
    ),
    "partial rotary, window, key biases": dict(qkv_bias=True, rotary_dim=10, sliding_window=13),
}  # fmt: skip


@pytest.fixture(scope="module", params=FEATURES)
def model(request, tiny_config):
    """Biases and norms drawn so that forgetting one shows."""
    sizes = dict(head_dim=16, num_layers=2, num_heads=6, rope_theta=50.0)
    config = dataclasses.replace(tiny_config, **sizes, **FEATURES[request.param])
    rng = np.random.default_rng(3)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        scale = 0.5 if "bias" in name else config.hidden_size**-0.5
        return jnp.asarray(rng.normal(0, scale, leaf.shape), leaf.dtype)

    shapes = nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0), jnp.float32))
    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, 97, (2, LENGTH)).astype(np.int32)


def frequencies(config):
    """Radians per position, pair by pair, and what cosine and sine are multiplied by."""
    pairs, found = (config.rotary_dim or config.head_dim) // 2, []
    for i in range(pairs):
        plain = config.rope_theta ** (-i / pairs)
        if config.rope_scaling == YARN:
            # the pair that turns n times within 16 positions, 16 theta**(-j/pairs) = 2 pi n
            fast, slow = (
                pairs * math.log(16 / (2 * math.pi * n), config.rope_theta) for n in (2.0, 0.25)
            )
            fast, slow = max(math.floor(fast), 0), math.ceil(slow)
            slowed = min(max((i - fast) / (slow - fast), 0), 1)
            found.append(plain * (1 - slowed) + plain / 4 * slowed)
        else:
            found.append(plain / 4 if config.rope_scaling else plain)
    return np.array(found), 1.2 if config.rope_scaling == YARN else 1.0


def numpy_logits(model, tokens):
    """One sequence in float64, head by head and without anything of the library but the weights."""
    config = model.config
    w = {
        jax.tree_util.keystr(path[:-1], simple=True, separator="."): np.asarray(leaf, np.float64)
        for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]
    }
    length, turn = len(tokens), functools.partial(numpy_rope, config)
    distance = np.subtract.outer(np.arange(length), np.arange(length))
    seen = (distance >= 0) & (distance < (config.sliding_window or length))

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * weight

    def capped(x, cap):
        return x if cap is None else cap * np.tanh(x / cap)

    hidden = w["embedding"][tokens]
    for i in range(config.num_layers):
        own = {k.removeprefix("layers."): x[i] for k, x in w.items() if k.startswith("layers.")}
        x, out = norm(hidden, own["attention_norm"]), 0.0
        group = config.num_heads // config.num_kv_heads
        for head in range(config.num_heads):

            def project(slot, kv=head // group, own=own, x=x):
                bias = own["qkv_bias"][kv, slot] if "qkv_bias" in own else 0.0
                return x @ own["qkv"][:, kv, slot] + bias

            q, k, v = (project(slot) for slot in (head % group, group, group + 1))
            if config.qk_norm:
                q, k = norm(q, own["qk_norm"][0]), norm(k, own["qk_norm"][1])
            scale = config.attention_scale or 1 / math.sqrt(config.head_dim)
            scores = capped(turn(q) @ turn(k).T * scale, config.attention_softcap)
            weight = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
            out = out + weight / weight.sum(-1, keepdims=True) @ v @ own["o"][head]
        hidden = hidden + out + own.get("o_bias", 0.0)
        x = norm(hidden, own["ffn_norm"])
        gate, up = (
            x @ own["gate_up"][:, j] + own.get("gate_up_bias", np.zeros((2, 1)))[j] for j in (0, 1)
        )
        hidden = hidden + gate / (1 + np.exp(-gate)) * up @ own["down"] + own.get("down_bias", 0.0)
    return capped(norm(hidden, w["norm"]) @ w.get("head", w["embedding"]).T, config.logit_softcap)


def numpy_rope(config, x):
    """Pairs (i, i + R/2) as complex numbers; channels from R on as they are."""
    found, factor = frequencies(config)
    pairs = len(found)
    angle = np.exp(1j * np.outer(np.arange(len(x)), found)) * factor
    turned = (x[:, :pairs] + 1j * x[:, pairs : 2 * pairs]) * angle
    return np.concatenate([turned.real, turned.imag, x[:, 2 * pairs :]], axis=1)


@jax.jit
def logits_of(model, hidden):
    return model.logits(hidden)


def test_logits_are_those_of_numpy(model, tokens):
    expected = np.stack([numpy_logits(model, row) for row in tokens])
    assert np.std(expected) > 0.5
    got = logits_of(model, exact_hidden(model, jnp.asarray(tokens)))
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)


def test_the_dense_past_is_a_whole_pass(model, tokens):
    """A prompt in chunks, then its last token: the logits of the whole pass."""
    state = dense.create(model.config, 2, LENGTH, jnp.float32)
    decoder = unstack(model)
    _, _, state = read(decoder, tokens[:, :-1].tolist(), state, dense.DENSE, chunk=32)
    got, *_ = read(decoder, tokens[:, -1:].tolist(), state, dense.DENSE, start=LENGTH - 1)
    expected = logits_of(model, exact_hidden(model, jnp.asarray(tokens)))[:, -1]
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)


def cache_config(model):
    sizes = model.config.num_layers, model.config.num_kv_heads, model.config.head_dim
    codecs = CodecConfig(3), CodecConfig(2)
    own = dict(block=8, window=4, sinks=2, sliding_window=model.config.sliding_window)
    return CacheConfig(*sizes, *codecs, **own, dtype="float32")


@jax.jit
def one_by_one(model, tokens, state):
    """Final hidden vectors [B, T, D], a token at a time through the cache."""

    def step(state, token):
        state = COMPRESSED.begin(state, jnp.ones(2, jnp.int32), 1)
        hidden, state = model(token[:, None], state.lengths[:, None], state, COMPRESSED.attend)
        return COMPRESSED.commit(state), hidden[:, 0]

    _, hidden = jax.lax.scan(step, state, tokens.T)
    return jnp.swapaxes(hidden, 0, 1)


def test_tokens_through_the_compressed_cache_are_one_pass(model, tokens):
    state = cache.create(cache_config(model), 2, LENGTH, key=jax.random.key(0))
    tokens = jnp.asarray(tokens)
    expected = compressed_hidden(model, tokens, state)
    assert jnp.linalg.norm(expected - exact_hidden(model, tokens)) > 1e-2
    # a rounding may move a coordinate across a threshold of the codebook, in a block of a layer
    difference = np.abs(one_by_one(model, tokens, state) - expected).max(-1)
    assert np.median(difference) < 1e-4 and np.quantile(difference, 0.9) < 1e-2


def test_value_biases_are_folded(model, tokens):
    folded = fold_value_rotation(model, rotation.create("haar", jax.random.key(5), 16))
    tokens = jnp.asarray(tokens)
    want = exact_hidden(model, tokens)
    np.testing.assert_allclose(exact_hidden(folded, tokens), want, atol=1e-4)


def test_a_cache_of_another_window_is_refused(model, tokens):
    other = dataclasses.replace(cache_config(model), sliding_window=40)
    state = cache.create(other, 2, LENGTH, key=jax.random.key(0))
    message = f"got 40, expected the model's {model.config.sliding_window}"
    for call in (compressed_hidden, one_by_one):
        with pytest.raises(ValueError, match=message):
            call(model, jnp.asarray(tokens), state)
