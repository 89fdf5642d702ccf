"""Every reason why a kernel does not serve a call, on a device that would."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.layout import calibration
from turboquant_jax import cache
from turboquant_jax.cache.choose import (
    Attention,
    Compression,
    choose_attention,
    choose_compression,
)

CODEC = cache.CodecConfig
SERVED = dict(num_layers=2, num_kv_heads=2, head_dim=32, block=32, window=5, sinks=2)
GROUPS = CODEC(((16, 4), (16, 3)))
JOINT = CODEC(((16, 4), (8, 2), (8, 1)), scales="joint")
ORDER = np.tile(np.arange(32, dtype=np.int32), (2, 2, 1))
LAYERS = cache.Allocation((4, 3), (3, 4))
HEADS = cache.Allocation((4, (4, 3)), (3, 3))
FIVE = dict(num_kv_heads=5, allocation=cache.Allocation(((1, 2, 3, 4, 5), 3), (3, 3)))
OF_HEADS = "heads of one layer in several formats"


def shapes(change, **options):
    config = cache.CacheConfig(**SERVED | change)
    options["calibration"] = calibration(config)
    return jax.eval_shape(lambda: cache.create(config, 1, 70, key=jax.random.key(0), **options))


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def refused(words):
    """With these words; None: it is not."""
    return nullcontext() if words is None else pytest.raises(NotImplementedError, match=words)


@pytest.mark.parametrize(
    ("queries", "change", "words"),
    [
        (1, {}, None),
        (1, dict(dtype="float32"), None),
        (1, dict(key=GROUPS, value=GROUPS), None),
        (1, dict(allocation=LAYERS), None),
        (8, {}, None),
        (9, {}, "'pallas' got 9 query tokens per sequence, served are up to 8"),
        (2, dict(sliding_window=90), "2 query tokens per sequence behind a sliding window"),
        (1, dict(dtype="float8_e4m3fn"), "a full precision of float8_e4m3fn"),
        (1, dict(window=100), "a cache without blocks"),
        (1, dict(allocation=HEADS), None),
        (1, FIVE, "heads of one layer in 5 formats, served are up to 4"),
        (
            1,
            dict(allocation=HEADS, key=CODEC(code="prod")),
            "heads of one layer in several formats, with a sketch",
        ),
        (1, dict(key=GROUPS), None),
        (1, dict(value=GROUPS, key=CODEC(((8, 4), (24, 3)), "haar")), None),
        (1, dict(key=JOINT), None),
        (1, dict(key=CODEC(codebook="lloyd_max")), "a codebook off the kernel's grid"),
        (1, dict(value=CODEC(codebook="gaussian")), "a codebook off the kernel's grid"),
        (
            1,
            dict(key=CODEC(codebook="gaussian"), allocation=LAYERS),
            "a codebook off the kernel's grid",
        ),
    ],
)
def test_decoding(queries, change, words, on_gpu):
    with refused(words):
        chosen = choose_attention(shapes(change), queries, None, "pallas")
        assert chosen.attend == chosen.pages == "pallas"


@pytest.mark.parametrize(
    ("queries", "change", "softcap", "words"),
    [
        (4, {}, None, None),
        (4, dict(head_dim=128, dtype="float16"), None, None),
        (4, dict(allocation=LAYERS), None, None),
        (4, dict(key=JOINT), None, None),
        (1, {}, None, "'cudnn' got one query token per sequence"),
        (4, dict(dtype="float32"), None, "a full precision of float32"),
        (4, dict(head_dim=20, key=CODEC(rotation="haar")), None, "a head dim of 20"),
        (4, dict(head_dim=256), None, "a head dim of 256"),
        (4, {}, 5.0, "a soft cap"),
        (4, dict(sliding_window=40), None, None),
        (4, dict(allocation=HEADS), None, None),
        (4, FIVE, None, None),
    ],
)
def test_a_chunk(queries, change, softcap, words, on_gpu):
    if change.get("head_dim") == 20:
        change = change | dict(value=CODEC(rotation="haar"))
    with refused(words):
        assert choose_attention(shapes(change), queries, softcap, "cudnn").attend == "cudnn"


@pytest.mark.parametrize(
    ("change", "orders", "words"),
    [
        ({}, (), None),
        (dict(key=GROUPS), (), None),
        (dict(allocation=LAYERS), (), None),
        (dict(block=8), (), "'pallas' got blocks of 8 tokens"),
        ({}, ("key_order",), "channels in an order of their own"),
        ({}, ("value_order",), "channels in an order of their own"),
        (dict(value=CODEC(2, code="trellis")), (), "a trellis code"),
        (dict(key=CODEC(code="prod")), (), "keys of the code prod"),
        (dict(value=CODEC(code="trellis"), allocation=LAYERS), (), "a trellis code"),
        (dict(key=CODEC(((20, 4), (12, 3)), "haar")), (), "a group of 20 channels"),
        (dict(allocation=HEADS), (), OF_HEADS),
        (dict(value=JOINT), (), "calibrated channels with one scale"),
    ],
)
def test_compression(change, orders, words, on_gpu):
    with refused(words):
        chosen = choose_compression(shapes(change, **dict.fromkeys(orders, ORDER)), "pallas")
        assert chosen == Compression("pallas", "pallas")


def test_compression_to_other_scales(on_gpu):
    state = shapes({})
    (part,) = state.parts
    key, value = part.codecs
    group = replace(value.groups[0], scale_dtype=jnp.dtype("float16"))
    other = replace(state, parts=(replace(part, codecs=(key, replace(value, groups=(group,)))),))
    with refused("scales in float16"):
        choose_compression(other, "pallas")


def test_the_first_that_serves_is_taken(on_gpu):
    kernel = Compression("pallas", "pallas")
    state = shapes({})
    for queries, first in ((1, "pallas"), (8, "pallas"), (9, "cudnn")):
        got = choose_attention(state, queries, None, None)
        assert got == Attention(first, "pallas", kernel)
    assert choose_attention(state, 9, None, None, 1) == Attention(
        "xla", "xla", Compression("xla", "xla"), shared=1
    )  # which the vendor's would read for each sequence
    assert choose_attention(state, 9, 5.0, None) == Attention(
        "xla", "xla", Compression("xla", "xla")
    )
    # the paths of a trellis are searched by a kernel where the blocks are not made by one
    trellis = shapes(dict(key=CODEC(code="trellis")))
    assert choose_compression(trellis, None) == Compression("xla", "pallas")
    # and the vendor reads pages that only XLA decodes
    off_grid = shapes(dict(key=CODEC(codebook="gaussian")))
    assert choose_attention(off_grid, 9, None, None) == Attention("cudnn", "xla", kernel)
    # signs have a linear reconstruction, which XLA multiplies out; decoding needs none
    sketched, plain = shapes(dict(key=CODEC(code="prod"))), Compression("xla", "pallas")
    assert choose_attention(sketched, 9, None, None) == Attention("cudnn", "xla", plain)
    assert choose_attention(sketched, 1, None, None) == Attention("pallas", "xla", plain)


@pytest.mark.parametrize("queries", [1, 4])
def test_what_xla_was_asked_for_contains_no_kernel(queries, on_gpu):
    plain = Compression("xla", "xla")
    state = shapes(dict(key=CODEC(code="trellis")))
    assert choose_compression(state, "xla") == plain
    assert choose_attention(state, queries, None, "xla") == Attention("xla", "xla", plain)


def test_any_other_device():
    if jax.default_backend() == "gpu":
        pytest.skip("it is served here")
    calls = [
        partial(choose_attention, shapes({}), 1, None, "pallas"),
        partial(choose_attention, shapes({}), 4, None, "cudnn"),
        partial(choose_compression, shapes({}), "pallas"),
    ]
    for call in calls:
        with refused("the backend 'cpu', served is 'gpu'"):
            call()
