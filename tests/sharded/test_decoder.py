"""A decoder on a mesh says what it says on one device; its weights lie where they belong."""

import itertools
import math
import re
from dataclasses import replace
from functools import cache as once
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from turboquant_jax import cache
from turboquant_jax.cache import CacheConfig, layout, sharding
from turboquant_jax.cache.mesh import make_mesh
from turboquant_jax.models import LlamaConfig, dense, load
from turboquant_jax.models import sharding as model_sharding
from turboquant_jax.models.generate import decode, prefill, step
from turboquant_jax.models.model import random_model
from turboquant_jax.models.options import GREEDY, Sampling
from turboquant_jax.models.past import COMPRESSED, on_mesh

BATCH, PROMPT, STEPS, CAPACITY = 2, 40, 6, 64
LLAMA = LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=16, max_position=64, rope_theta=1e4, rms_norm_eps=1e-5,
    tie_embeddings=False, qkv_bias=True,
)  # fmt: skip
CONFIG = CacheConfig(2, 2, 16, block=8, window=8, dtype="float32")


MESHES = [
    dict(data=data, tensor=tensor, context=context)
    for data, tensor, context in itertools.product((1, 2, 4, 8), repeat=3)
    if 2 <= data * tensor * context <= 8
]


def generated(mesh, sampling, llama=LLAMA, batch=BATCH, prompt=PROMPT):
    model = random_model(llama, 0, jnp.float32, stacked=False)
    key, capacity = jax.random.key(0), prompt + 24
    if mesh is None:
        past, state = COMPRESSED, cache.create(CONFIG, batch, capacity, key=key)
    else:
        past, model = on_mesh(mesh), model_sharding.shard(model, mesh)
        config = replace(CONFIG, num_kv_heads=model.config.num_kv_heads)
        state = sharding.create(mesh, config, batch, capacity, key=key)
    tokens = jax.random.randint(jax.random.key(1), (batch, prompt), 0, 96)
    lengths = jnp.full(batch, prompt, jnp.int32).at[1].add(-9)
    logits, state = prefill(model, tokens, lengths, state, past)
    keys = jax.random.split(jax.random.key(2), batch)
    call = partial(decode, model, logits, lengths, keys, state, past, sampling=sampling)
    return logits, call


@pytest.mark.parametrize(
    "sizes",
    [dict(tensor=2), dict(data=2, tensor=2, context=2), dict(tensor=4)],  # two devices a kv head
    ids=str,
)
def test_the_same_tokens_as_on_one_device(sizes):
    sampling = Sampling(temperature=0.8)
    (expected, one), (logits, many) = (
        generated(mesh, sampling) for mesh in (None, make_mesh(**sizes))
    )
    np.testing.assert_allclose(logits, expected, atol=2e-5)  # sums in another order
    got, want = (call(max_tokens=STEPS).tokens for call in (many, one))
    np.testing.assert_array_equal(got, want)


@pytest.fixture
def of_eight(monkeypatch):
    """Eight sequences of six stripes, and as many heads as there are devices."""
    monkeypatch.setattr(layout, "STRIPE", 16)
    llama = replace(LLAMA, num_heads=8, max_position=128)
    return dict(sampling=GREEDY, llama=llama, batch=8, prompt=100)


@once
def greedy(**options):
    logits, call = generated(None, **options)
    return np.asarray(logits), np.asarray(call(max_tokens=STEPS).tokens)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_same_greedy_tokens_on_every_mesh(of_eight, sizes):
    expected, want = greedy(**of_eight)
    logits, call = generated(make_mesh(**sizes), **of_eight)
    np.testing.assert_allclose(logits, expected, atol=2e-5)  # sums in another order
    np.testing.assert_array_equal(call(max_tokens=STEPS).tokens, want)


def test_a_step_exchanges_two_sums_a_layer_and_a_few_numbers():
    """Beside them the sum that reads the embedding, and the best logit of every device."""
    mesh = make_mesh(tensor=2)
    model = model_sharding.random_model(LLAMA, 0, mesh, jnp.float32)
    state = sharding.create(mesh, CONFIG, BATCH, CAPACITY, key=jax.random.key(0))
    token, keys = jnp.zeros(BATCH, jnp.int32), jax.random.split(jax.random.key(2), BATCH)
    lowered = step.lower(
        model, token, token, jnp.ones(BATCH, bool), keys, state, on_mesh(mesh), GREEDY
    )
    kind = "(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"
    found = re.findall(rf"= (.*) {kind}(?:-start)?\(", lowered.compile().as_text())
    sizes = {kind: [] for _, kind in found}
    for shapes, kind in found:
        dims = re.findall(r"[a-z]\d+\[([\d,]*)\]", shapes)
        sizes[kind] += [math.prod(map(int, filter(None, text.split(",")))) for text in dims]
    assert sizes.pop("all-reduce") == [BATCH * LLAMA.hidden_size] * (2 * LLAMA.num_layers + 1)
    assert sizes.keys() == {"all-gather"} and max(sizes["all-gather"]) <= 2 * BATCH


@pytest.mark.parametrize("tensor", [2, 4])
def test_random_weights_are_those_of_one_device(tensor):
    mesh = make_mesh(tensor=tensor)
    expected = model_sharding.shard(random_model(LLAMA, 3, stacked=False), mesh)
    found = model_sharding.random_model(LLAMA, 3, mesh)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for leaf, own in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert leaf.sharding == own.sharding
        np.testing.assert_array_equal(leaf, own)


def test_a_dense_past_says_what_it_says_on_one_device():
    mesh = make_mesh(data=2, tensor=2)
    model = random_model(LLAMA, 0, jnp.float32, stacked=False)
    tokens = jax.random.randint(jax.random.key(1), (BATCH, PROMPT), 0, 96)
    lengths, keys = jnp.full(BATCH, PROMPT), jax.random.split(jax.random.key(2), BATCH)

    def said(model, past):
        state = dense.create(LLAMA, BATCH, CAPACITY, jnp.float32)
        logits, state = prefill(model, tokens, lengths, state, past)
        return decode(model, logits, lengths, keys, state, past, max_tokens=STEPS).tokens

    got = said(model_sharding.shard(model, mesh), dense.on_mesh(mesh))
    np.testing.assert_array_equal(got, said(model, dense.DENSE))


@pytest.mark.parametrize("tensor", [2, 4])
def test_weights_of_a_gguf_file_go_to_their_devices(tmp_path, gguf_tensors, write_gguf, tensor):
    config = replace(LLAMA, vocab_size=100, qkv_bias=False, bos_id=1, eos_ids=(2,))
    model, mesh = random_model(config, 0, jnp.float32), make_mesh(tensor=tensor)
    path = write_gguf(tmp_path / "small.gguf", config, gguf_tensors(model))
    expected = model_sharding.shard(load(path).model, mesh)
    found, wanted = (jax.tree.leaves(m) for m in (load(path, mesh=mesh).model, expected))
    assert any(not leaf.sharding.is_fully_replicated for leaf in wanted)
    for leaf, own in zip(found, wanted, strict=True):
        assert leaf.sharding == own.sharding
        np.testing.assert_array_equal(leaf, own)
