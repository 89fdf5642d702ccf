"""On four GPUs: a mesh holds the bits of one of them, attends alike, and its decoder says the same.

In use the stripes of `context` are long, and so are the sequences here.
"""

from dataclasses import replace
from functools import cache as once
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.marks import GPU
from tests.sharded import read
from tests.sharded.read import Sizes
from turboquant_jax import attention, cache
from turboquant_jax.attention import sharding as attention_sharding
from turboquant_jax.cache import CacheConfig, CodecConfig, layout, sharding
from turboquant_jax.cache.mesh import make_mesh
from turboquant_jax.models import LlamaConfig
from turboquant_jax.models import sharding as model_sharding
from turboquant_jax.models.generate import decode, prefill
from turboquant_jax.models.model import random_model
from turboquant_jax.models.past import COMPRESSED, on_mesh

pytestmark = [
    *GPU,
    pytest.mark.skipif(jax.device_count() < 4, reason="needs four GPUs"),
]

HEADS, GROUP, DIM, LENGTH, PROMPT, STEPS = 8, 4, 128, 17000, 4700, 24
FREQUENCIES = tuple(5e5 ** -(np.arange(DIM // 2) / (DIM // 2)))
CONFIG = CacheConfig(
    1, HEADS, DIM, CodecConfig(4), CodecConfig(4), rope_frequencies=FREQUENCIES, dtype="bfloat16"
)
CAPACITY = LENGTH + 200
LLAMA = LlamaConfig(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_layers=2, num_heads=HEADS * GROUP,
    num_kv_heads=HEADS, head_dim=DIM, max_position=2 * PROMPT, rope_theta=5e5, rms_norm_eps=1e-5,
    tie_embeddings=False,
)  # fmt: skip
MESHES = {
    "tensor2": Sizes(tensor=2),
    "context2": Sizes(context=2),
    "both": Sizes(tensor=2, context=2),
    "tensor4": Sizes(tensor=4),
    "context4": Sizes(context=4),
}
of_every_mesh = pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)


@pytest.fixture(autouse=True)
def stripes(monkeypatch):
    monkeypatch.setattr(read, "STRIPE", layout.STRIPE)


@once
def held(sizes):
    """A chunk and two tokens, one of which completes the first block of the second sequence; then
    attention.
    """
    create, append, attend = cache.create, cache.append, attention.attend
    if sizes is not None:
        create, append, attend = (
            partial(call, make_mesh(*sizes))
            for call in (sharding.create, sharding.append, attention_sharding.attend)
        )
    counts = jnp.array([LENGTH, CONFIG.sinks + CONFIG.window + CONFIG.block - 1], jnp.int32)
    state = create(CONFIG, 2, CAPACITY, key=jax.random.key(0))
    k, v = jax.random.normal(jax.random.key(1), (2, 1, 2, LENGTH, HEADS, DIM), jnp.bfloat16)
    new = jax.random.normal(jax.random.key(2), (2, 1, 2, 1, HEADS, DIM), jnp.bfloat16)
    append = jax.jit(append)
    state = append(state, k, v, counts)
    for _ in range(2):
        state = append(state, *new)
    q = jax.random.normal(jax.random.key(3), (2, 1, HEADS * GROUP, DIM), jnp.float32)
    k, v = new[:, 0].astype(jnp.float32)
    output = jax.jit(attend, static_argnums=1)(state, 0, q, k, v)
    return read.stored(state, sizes or Sizes()), np.asarray(output)


@of_every_mesh
def test_attention_is_that_of_one_gpu(sizes):
    found, expected = held(sizes)[1], held(None)[1]
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    print(f"{sizes}: relative error {error:.1e}")
    assert error < 5e-5  # sums of shares are in another order, and a code or two is another one


@of_every_mesh
def test_a_mesh_holds_what_one_gpu_holds(sizes):
    """Over `tensor` bit for bit. Over `context` every device makes the mean key itself, where one
    device has it from the kernel that encodes: another order of sums, a few other codes.
    """
    found, expected = held(sizes)[0], held(None)[0]
    if sizes.context == 1:
        read.assert_equal(found, expected)
        return
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        array, other = np.asarray(array), np.asarray(found[name])
        if name == "mean":
            np.testing.assert_allclose(other, array, rtol=1e-5, atol=1e-6)
        elif ".keys" in name[-1] and array.dtype == np.uint8:
            assert np.mean(other != array) < 1e-5, name
        elif ".scales" in name[-1]:
            assert np.mean(other != array) < 1e-3, name
        else:
            np.testing.assert_array_equal(other, array, str(name))


@once
def said(sizes):
    """Greedy tokens of two sequences, and the logits of their prompts."""
    model = random_model(LLAMA, 0, jnp.float32, stacked=False)
    config = replace(CONFIG, num_layers=LLAMA.num_layers, dtype="float32")
    options = config, 2, PROMPT + STEPS
    if sizes is None:
        past, state = COMPRESSED, cache.create(*options, key=jax.random.key(0))
    else:
        mesh = make_mesh(*sizes)
        past, model = on_mesh(mesh), model_sharding.shard(model, mesh)
        state = sharding.create(mesh, *options, key=jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(4), (2, PROMPT), 0, LLAMA.vocab_size)
    lengths, keys = jnp.array([PROMPT, PROMPT - 300]), jax.random.split(jax.random.key(5), 2)
    with jax.default_matmul_precision("highest"):
        logits, state = prefill(model, tokens, lengths, state, past)
        made = decode(model, logits, lengths, keys, state, past, max_tokens=STEPS)
    return np.asarray(made.tokens), np.asarray(logits)


@of_every_mesh
def test_the_decoder_says_what_it_says_on_one_gpu(sizes):
    (tokens, logits), (expected, exact) = said(sizes), said(None)
    error = np.linalg.norm(logits - exact) / np.linalg.norm(exact)
    print(f"{sizes}: logits of the prompts, relative error {error:.1e}")
    assert error < 1e-2  # a key on the edge between two codes may take the other one
    np.testing.assert_array_equal(tokens, expected)
