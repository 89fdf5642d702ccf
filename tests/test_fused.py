"""The fused kernel over all segments of a cache equals the definition on the same cache."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import schedule
from pallas_kernels.primitives import triton
from tests.layout import QUICK, random_parts
from tests.marks import GPU
from turboquant_jax import cache, fused
from turboquant_jax.attention import attend, attend_and_write, attend_pallas
from turboquant_jax.cache import blocks
from turboquant_jax.llama.model import split_heads
from turboquant_jax.segments import Scores

CODEC = cache.CodecConfig
SHAPE = dict(num_layers=2, num_kv_heads=2, block=32, window=5, sinks=2)
SETTINGS = {
    "centred": dict(head_dim=32, key=CODEC(2), value=CODEC(2, "haar")),
    "outliers in a sliding window": dict(
        head_dim=96, key=CODEC(((64, 3), (32, 2))), value=CODEC(((64, 2), (32, 4))),
        sliding_window=70, center_keys=False, sinks=0, dtype="float32",
    ),
}  # fmt: skip
TRELLIS = partial(CODEC, code="trellis")
SETTINGS["trellis"] = dict(head_dim=64, key=TRELLIS(3), value=TRELLIS(2))
COMPILED = SETTINGS | {
    "trellis of groups": dict(
        head_dim=64,
        key=TRELLIS(((32, 2), (32, 1))),
        value=CODEC(((32, 4), (32, 3)), "haar"),
        center_keys=False,
    ),
    "balanced": dict(head_dim=128, key=TRELLIS(3), value=TRELLIS(3), block=64, window=128),
    "max": dict(head_dim=128, key=TRELLIS(2), value=TRELLIS(2), block=64, window=128),
    "trellis of 4 bits": dict(head_dim=64, key=TRELLIS(4), value=TRELLIS(4)),
    "folded rotation": dict(head_dim=128, key=CODEC(4), value=CODEC(4, "identity"), window=128),
    "wide": dict(head_dim=80, key=CODEC(8, "haar"), value=CODEC(5, "haar"), dtype="float16"),
    "plain": dict(head_dim=128, key=CODEC(4), value=CODEC(3), window=100, sinks=20),
}


def random_cache(config, rng):
    """Any bytes, pages in any order; one sequence is empty, one ends inside the first window."""
    orders = [
        rng.permuted(np.tile(np.arange(config.head_dim), (2, 2, 1)), axis=-1).astype(np.int32)
        for _ in range(2)
    ]
    mixed = not isinstance(config.key.bits, int)
    options = dict(key_order=orders[0], value_order=orders[1]) if mixed else {}
    state = cache.create(config, 3, 400, key=jax.random.key(0), **options)

    table = rng.permutation(state.page_table.size).astype(np.int32)
    return replace(
        state,
        **random_parts(state, rng),
        page_table=jnp.asarray(table.reshape(state.page_table.shape)),
        lengths=jnp.asarray([0, 3, 399], jnp.int32),
        pending=jnp.asarray([1, 1, 0], jnp.int32),
    )


@pytest.mark.parametrize(
    ("name", "interpret"),
    [
        *((name, True) for name in SETTINGS),
        *(pytest.param(name, False, marks=GPU) for name in COMPILED),
    ],
)
def test_the_fused_kernel_equals_the_definition(name, interpret, monkeypatch):
    monkeypatch.setattr(schedule, "MIN_TILES", 2)  # several splits, the last one with less
    config = cache.CacheConfig(**SHAPE | COMPILED[name])
    rng = np.random.default_rng(5)
    state = random_cache(config, rng)
    shape = (3, 1, 2, config.head_dim)
    k, v = (jnp.asarray(x) for x in rng.normal(0, 1, (2, *shape)).astype(np.float32))
    q = jnp.asarray(rng.normal(0, 1, (3, 1, 6, config.head_dim)).astype(np.float32))
    mixed = config.sliding_window is not None
    scores = Scores(scale=0.3, softcap=4.0) if mixed else Scores()
    sinks = jnp.asarray(rng.normal(0, 1, 6).astype(np.float32)) if mixed else None

    @partial(jax.jit, compiler_options=QUICK if interpret else None)
    def both(state, q, k, v):
        layer = jnp.int32(1)
        with jax.default_matmul_precision("highest"):
            want = attend(
                state, layer, q, k, v, scores=scores, sink_logits=sinks, implementation="xla"
            )
        with triton.interpreted(interpret):
            got, written = attend_pallas(state, layer, q, k, v, scores, sinks, write=True)
        return want, got, cache.write(state, layer, k, v), written

    want, got, definition, written = both(state, q, k, v)
    assert np.isfinite(got).all()
    # queries and shares of the blocks are 15-bit integers: see tests/pallas_kernels
    assert np.linalg.norm(got - want) <= 2e-3 * np.linalg.norm(want)
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)  # nothing but the token itself
    jax.tree.map(np.testing.assert_array_equal, written, definition)


@pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=GPU)])
@pytest.mark.parametrize("name", ["centred", "trellis of groups"])
def test_a_step_that_turns_its_own_queries(name, interpret):
    """RoPE and rotation in one kernel, then attention, as the definition does it in three."""
    config = cache.CacheConfig(**SHAPE | COMPILED[name])
    rng = np.random.default_rng(6)
    state, dim = random_cache(config, rng), config.head_dim
    qkv = jnp.asarray(rng.normal(0, 1, (3, 1, 2, 5, dim)), jnp.bfloat16)
    angle = rng.uniform(-9, 9, (3, 1, dim // 2))
    cos, sin = (jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))

    @partial(jax.jit, compiler_options=QUICK if interpret else None)
    def both(state, qkv, cos, sin):
        layer = jnp.int32(1)
        with jax.default_matmul_precision("highest"):
            heads = split_heads(qkv, cos, sin)
            want = attend(state, layer, *heads, implementation="xla")
        with triton.interpreted(interpret):
            *token, rotated = fused.turn(state, layer, qkv[:, 0], cos[:, 0], sin[:, 0])
            token = (x[:, None] for x in token)
            got = attend_pallas(state, layer, *token, Scores(), None, rotated=rotated)[0]
        return want, got

    want, got = (np.asarray(x, np.float32) for x in both(state, qkv, cos, sin))
    assert np.isfinite(got).all()
    # both round their queries, and their output, to bfloat16
    assert np.linalg.norm(got - want) <= 1e-2 * np.linalg.norm(want)


@pytest.mark.parametrize(
    ("name", "interpret"),
    [
        ("outliers in a sliding window", True),
        ("trellis", True),
        *(pytest.param(n, False, marks=GPU) for n in COMPILED),
    ],
)
def test_decoded_pages_are_those_of_the_definition(name, interpret):
    config = cache.CacheConfig(**SHAPE | COMPILED[name])
    state = random_cache(config, np.random.default_rng(5))
    pages = jnp.asarray([[1, 0], [2, 2]], jnp.int32)
    heads = jnp.asarray([1, 0], jnp.int32)
    with triton.interpreted(interpret):
        found = jax.jit(fused.decode)(state, jnp.int32(1), pages, heads)
    groups = blocks.unpack(state.codecs, jax.tree.map(lambda x: x[1], state.pool))
    for got, codec, group in zip(found, state.codecs, groups, strict=True):
        want = codec.dequantize(group)[pages][:, :, heads]  # [B, pages, K, T, H]
        want = jnp.moveaxis(want, 2, 3).reshape(got.shape)
        # the kernel multiplies scale * (step * level), the definition scale * level
        step = {"bfloat16": 2**-8, "float16": 2**-10, "float32": 2**-22}[config.dtype]
        np.testing.assert_allclose(got.astype(np.float32), want, rtol=step, atol=1e-7)


@pytest.mark.parametrize("pages", [pytest.param(33_000, marks=GPU)])
def test_a_step_in_planes_that_signed_32_bit_offsets_do_not_span(pages):
    config = cache.CacheConfig(2, 8, 128, CODEC(4), CODEC(4), window=64)
    small = cache.create(config, 1, 1024, key=jax.random.key(0))
    small = replace(small, **random_parts(small, np.random.default_rng(5)))
    small = replace(small, lengths=jnp.asarray([899], jnp.int32))  # one more completes a block
    held = small.references.shape[0]

    @jax.jit
    def at_the_end(state):
        def longer(x):
            return jnp.zeros((x.shape[0], pages, *x.shape[2:]), x.dtype).at[:, -held:].set(x)

        return replace(
            state,
            pool=jax.tree.map(longer, state.pool),
            page_table=state.page_table + (pages - held),
            references=longer(state.references[None])[0],
        )

    large = at_the_end(small)
    assert 2**31 < large.pool.keys[0][0].size < 2**32
    q = jax.random.normal(jax.random.key(1), (1, 1, 32, 128), jnp.bfloat16)
    k, v = jax.random.normal(jax.random.key(2), (2, 1, 1, 8, 128), jnp.bfloat16)

    @partial(jax.jit, donate_argnums=0)
    def step(state):
        state, outs = cache.begin(state, jnp.ones(1, jnp.int32), 1), []
        for layer in range(2):
            out, state = attend_and_write(state, layer, q, k, v, implementation="pallas")
            outs.append(out)
        state = cache.commit(state, implementation="pallas")
        return outs, jax.tree.map(lambda x: x[:, -held:], state.pool), state

    *want, _ = step(small)
    *got, _ = step(large)
    jax.tree.map(np.testing.assert_array_equal, got, want)
