"""The engine of the experiments against the library's teacher forcing, and so the real cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.fidelity import codecs, settings
from experiments.fidelity.allocation import One
from experiments.fidelity.choices import pre_rope
from experiments.fidelity.forced_attention import forced_attention
from experiments.fidelity.forcing import Tiling, _attend, _center, cut
from experiments.fidelity.rule import Rule
from experiments.fidelity.settings import Setting, turbo
from experiments.harness import prepared
from pallas_kernels.primitives import triton
from turboquant_jax import cache
from turboquant_jax.attention.teacher_forcing import teacher_forced
from turboquant_jax.cache.bytes import count_bytes
from turboquant_jax.models.evaluate import compressed_hidden, exact_hidden
from turboquant_jax.models.model import Llama

CONTEXT = 90
SETTINGS = [
    turbo(4, 1, window=0, sinks=0, block=16, centred=False, scale="norm"),
    turbo(2, 3, "trellis", window=20, sinks=5, block=8),
]


@pytest.fixture(scope="module")
def tiny():
    return prepared.model("tiny")


@pytest.fixture(scope="module")
def biased():
    """Untied, head dim 128, groups of 7, and keys whose bias is large at low frequencies."""
    sizes = dict(num_layers=2, num_heads=7, num_kv_heads=1, head_dim=128)
    config = dataclasses.replace(prepared.TINY, **sizes, tie_embeddings=False, qkv_bias=True)
    model = Llama(config, nnx.Rngs(0), jnp.float32)
    bias = np.zeros(model.layers.qkv_bias.shape)
    bias[..., -2, :] = np.tile(np.linspace(0, 40, 64), 2)  # of the key, by pair
    model.layers.qkv_bias[...] = jnp.asarray(bias, jnp.float32)
    return model


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.preset)
def test_layer_by_layer_is_the_library_s_teacher_forcing(tiny, setting):
    tokens = prepared.random_texts(2, CONTEXT)
    config = dataclasses.replace(setting.cache_config(tiny.config), dtype="float32")
    state = cache.create(config, 2, CONTEXT, key=jax.random.key(5))
    expected = compressed_hidden(tiny, jnp.asarray(tokens), state)
    forcing = cut(tiny, dtype="float32", tiling=Tiling(queries=40, reach=32, sinks=6))
    trips = setting.trips(5, tiny.config)
    made = forcing.run(tokens, setting.rule, trips, errors=True)
    np.testing.assert_allclose(made.hidden, expected, atol=2e-5)
    assert np.all(made.attention_error > 0.01) and made.attention_error.shape == (2, 2)
    exact = forcing.full(tokens)
    np.testing.assert_allclose(exact.hidden, exact_hidden(tiny, jnp.asarray(tokens)), atol=2e-5)
    assert np.abs(exact.hidden - expected).max() > 1e-2, "nothing was compressed"
    later = One(1, 1, "V")
    whole, resumed = (
        forcing.run(tokens, setting.rule, later.trips(5, tiny.config), resume=resume)
        for resume in (None, (1, forcing.full(tokens, keep=True).entering[1]))
    )
    # not bit by bit: layers in full precision add up in the order of the rule
    np.testing.assert_allclose(whole.hidden, resumed.hidden, atol=2e-5)
    assert np.abs(whole.hidden - exact.hidden).max() > 1e-3


@pytest.mark.parametrize("numbers", [(64, 4, 64), (0, 0, 8), (20, 5, 16)])
def test_the_kernel_attends_as_the_definition_does(numbers):
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v, *noise = (
        jax.random.normal(key, (1, 256, heads, 64)) for key, heads in zip(keys, (4, 2, 2, 2, 2))
    )
    k, v = (x.astype(jnp.bfloat16) for x in (k, v))
    near = [x.astype(jnp.float32) + 0.3 * y for x, y in zip((k, v), noise)]
    rule = Rule(*numbers).arrays()
    expected = _attend(2 * q, k, v, *near, rule, Tiling())
    with triton.interpreted():
        made = forced_attention(2 * q, k, v, *near, rule)
    np.testing.assert_allclose(made, expected, atol=1e-5)


def test_the_kernel_refuses_texts_that_are_no_whole_tiles():
    x = jnp.zeros((1, 160, 2, 64))
    with pytest.raises(ValueError, match="multiples of 128 tokens, got 160"):
        forced_attention(x, x, x, x, x, Rule(0, 0, 8).arrays())


def test_keys_are_centred_before_their_rotary_embedding_as_the_library_does(biased):
    """The same heads in both: what their last bits decide in a code is not at issue."""
    setting = turbo(2, 3, window=16, sinks=5, block=16, pre_rope=True)
    config = dataclasses.replace(setting.cache_config(biased.config), dtype="float32")
    state = cache.create(config, 1, CONTEXT, key=jax.random.key(5))
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, CONTEXT, n, 128)) for key, n in zip(keys, (7, 1, 1)))
    forcing = cut(biased, dtype="float32", tiling=Tiling(queries=40, reach=32, sinks=6))
    rule, trips = setting.rule.arrays(), setting.trips(5, biased.config)(0)
    centred, taken = _center(k, rule.sinks, 16, forcing._phases(setting.rule, CONTEXT))
    made = forcing._attend(q, k, v, trips[0](centred) + taken, trips[1](v), rule)
    np.testing.assert_allclose(made, teacher_forced(state, 0, q, k, v), atol=2e-5)


def test_keys_of_a_large_mean_survive_centring_before_their_rotary_embedding(biased):
    """Biases make keys that one vector turned to their positions nearly is: nothing else holds."""
    tokens = prepared.random_texts(1, CONTEXT)
    forcing = cut(biased, tiling=Tiling(queries=40, reach=32, sinks=6))
    exact = forcing.full(tokens)
    stored = turbo(4, None, window=8, sinks=4, block=16)
    loss = {
        setting.preset: forcing.compare(
            tokens, exact, forcing.run(tokens, setting.rule, setting.trips(0, biased.config))
        ).kl.mean()
        for setting in (stored, pre_rope(stored))
    }
    assert 10 * loss["K4 Vfull w8 block16 pre-RoPE"] < loss["K4 Vfull w8 block16"]


def test_scores_of_another_scale_are_refused(tiny):
    config = dataclasses.replace(tiny.config, attention_softcap=30.0)
    with pytest.raises(ValueError, match=r"model: got .*softcap=30\.0.* expected neither"):
        cut(Llama(config, nnx.Rngs(0), jnp.float32))


def test_a_rule_beyond_the_reach_of_the_tiles_is_refused(tiny):
    forcing = cut(tiny, tiling=Tiling(queries=8, reach=16, sinks=4))
    for rule in (Rule(9, 0, 8, False), Rule(0, 5, 8, False)):
        with pytest.raises(ValueError, match="must be at most 16 and 4"):
            forcing.run(prepared.random_texts(1, 16), rule, lambda layer: (None, None))


def test_bytes_of_caches_the_library_does_not_have(tiny):
    config = tiny.config
    ours = turbo(3, 2, window=20, block=8)
    library = ours.bytes_per_token(config, 200)
    counted = count_bytes(cache.create(ours.cache_config(config), 1, 200, key=jax.random.key(0)))
    assert library * 200 == counted.total
    compressed = (
        config.num_layers * config.num_kv_heads * ours.cache_config(config).compressed_tokens(200)
    )
    # a byte less of scale for each vector, and nothing else
    short = turbo(3, 2, short=True, window=20, block=8).bytes_per_token(config, 200)
    rotations = counted.codecs  # the stand-in has no rotation, 256 bytes of signs each
    assert round((library - short) * 200) == 2 * compressed + rotations
    full = Setting("", codecs.Exact(), codecs.Exact(), window=20, block=8)
    fp8 = Setting("", codecs.Fp8(), codecs.Fp8(), window=20, block=8)
    exact, half = (s.bytes_per_token(config, 200) * 200 for s in (full, fp8))
    assert round(exact - half) == 2 * 64 * compressed


def test_min_max_levels_are_exact_on_their_grid():
    low, step = -1.5, 0.25
    grid = low + step * jnp.asarray([[0, 3, 1, 2], [3, 0, 0, 3]], jnp.float32)
    np.testing.assert_array_equal(codecs.min_max(grid, 2), grid)
    constant = jnp.full((1, 4), 0.5)
    np.testing.assert_array_equal(codecs.min_max(constant, 2), constant)


@pytest.mark.parametrize(
    ("coder", "bytes_of_64", "error"),
    [
        (codecs.Kivi(4, True), 40, (0.002, 0.02)),
        (codecs.Kivi(2, False), 24, (0.05, 0.3)),
        (codecs.PerToken(4, 64), 36, (0.002, 0.02)),
        (codecs.VllmKey(4), 34, (0.005, 0.012)),
        (codecs.Fp8(), 64, (1e-5, 2e-3)),
        (codecs.Turbo(cache.CodecConfig(3, code="prod")), 28, (0.02, 0.2)),
    ],
)
def test_peers_cost_what_they_say_and_err_as_they_should(coder, bytes_of_64, error):
    assert coder.vector_bytes(64) == bytes_of_64
    x = jax.random.normal(jax.random.key(1), (1, 40, 2, 64))
    back = coder.trip(jax.random.key(0), 64)(x)
    low, high = error
    assert low < jnp.mean((back - x) ** 2) / jnp.mean(x**2) < high


def test_kivi_s_keys_share_a_step_over_tokens_of_a_channel():
    x = jnp.ones((1, 64, 1, 64)) * jnp.arange(64.0)[None, None, None]
    back = codecs.Kivi(2, True).trip(jax.random.key(0), 64)(x)
    np.testing.assert_array_equal(back, x)


def test_names_say_what_is_unusual():
    assert turbo(3, 2, "trellis", window=128).preset == "K3 V2 trellis w128"
    assert turbo(None, 2, short=True, sinks=0, block=32, centred=False, rotation="haar").preset == (
        "Kfull V2 scale8 haar w64 sinks0 block32 uncentred"
    )
    assert len(settings.peers(30)) == 13
