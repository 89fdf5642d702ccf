"""Every reason why a kernel does not serve a call, on a device that would."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from turboquant_jax import cache, fused, prefill
from turboquant_jax.cache import encoding
from turboquant_jax.segments import PLAIN, Scores

CODEC = cache.CodecConfig
SERVED = dict(num_layers=2, num_kv_heads=2, head_dim=32, block=32, window=5, sinks=2)
GROUPS = CODEC(((16, 4), (16, 3)))
ORDER = np.tile(np.arange(32, dtype=np.int32), (2, 2, 1))


def shapes(change, **options):
    config = cache.CacheConfig(**SERVED | change)
    return jax.eval_shape(lambda: cache.create(config, 1, 70, key=jax.random.key(0), **options))


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def says(found, words):
    assert found is None if words is None else found is not None and words in found, found


@pytest.mark.parametrize(
    ("queries", "change", "words"),
    [
        (1, {}, None),
        (1, dict(dtype="float32"), None),
        (1, dict(key=GROUPS, value=GROUPS), None),
        (2, {}, "2 query tokens per sequence, served is 1"),
        (1, dict(dtype="float8_e4m3fn"), "a full precision of float8_e4m3fn"),
        (1, dict(window=100), "a cache without blocks"),
        (1, dict(key=GROUPS), "different groups of channels"),
        (
            1,
            dict(value=GROUPS, key=CODEC(((8, 4), (24, 3)), "haar")),
            "different groups of channels",
        ),
        (1, dict(key=CODEC(codebook="lloyd_max")), "a codebook off the kernel's grid"),
        (1, dict(value=CODEC(codebook="gaussian")), "a codebook off the kernel's grid"),
    ],
)
def test_decoding(queries, change, words, on_gpu):
    says(fused.unserved(shapes(change), queries), words)


@pytest.mark.parametrize(
    ("queries", "change", "scores", "words"),
    [
        (4, {}, PLAIN, None),
        (4, dict(head_dim=128, dtype="float16"), Scores(scale=1.0), None),
        (1, {}, PLAIN, "one query token per sequence"),
        (4, dict(dtype="float32"), PLAIN, "a full precision of float32"),
        (4, dict(head_dim=20, key=CODEC(rotation="haar")), PLAIN, "a head dim of 20"),
        (4, dict(head_dim=256), PLAIN, "a head dim of 256"),
        (4, {}, Scores(softcap=5.0), "a soft cap"),
        (4, dict(sliding_window=40), PLAIN, "a sliding window"),
    ],
)
def test_a_chunk(queries, change, scores, words, on_gpu):
    if change.get("head_dim") == 20:
        change = change | dict(value=CODEC(rotation="haar"))
    state = shapes(change)
    q = jax.ShapeDtypeStruct((1, queries, 4, state.config.head_dim), jnp.bfloat16)
    says(prefill.unserved(state, q, scores), words)


@pytest.mark.parametrize(
    ("change", "orders", "words"),
    [
        ({}, (), None),
        (dict(key=GROUPS), (), None),
        (dict(block=8), (), "blocks of 8 tokens"),
        ({}, ("key_order",), "channels in an order of their own"),
        ({}, ("value_order",), "channels in an order of their own"),
        (dict(value=CODEC(2, code="trellis")), (), "a trellis code"),
        (dict(key=CODEC(((20, 4), (12, 3)), "haar")), (), "a group of 20 channels"),
    ],
)
def test_compression(change, orders, words, on_gpu):
    says(encoding.unserved(shapes(change, **dict.fromkeys(orders, ORDER))), words)


def test_compression_to_other_scales(on_gpu):
    state = shapes({})
    key, value = state.codecs
    group = replace(value.groups[0], scale_dtype=jnp.dtype("float16"))
    other = replace(state, codecs=(key, replace(value, groups=(group,))))
    says(encoding.unserved(other), "scales in float16")


def test_any_other_device():
    if jax.default_backend() == "gpu":
        pytest.skip("it is served here")
    state = shapes({})
    q = jax.ShapeDtypeStruct((1, 4, 4, 32), jnp.bfloat16)
    calls = [
        partial(fused.unserved, state, 1),
        partial(prefill.unserved, state, q, PLAIN),
        partial(encoding.unserved, state),
    ]
    for call in calls:
        says(call(), "the backend 'cpu', served is 'gpu'")
