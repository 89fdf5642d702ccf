"""Every configuration that the benchmark names lowers for CUDA, on a machine without a GPU."""

import jax
import jax.numpy as jnp
import pytest

from experiments.decode_speed import BITS, SHAPES, TRELLIS_BITS, attend, schedule_of
from pallas_kernels import trellis as trellis_kernel
from pallas_kernels.decode_attention import (
    Blocks,
    Codebook,
    PagedBlocks,
    Sketch,
    Softmax,
    decode_attention,
)
from turboquant_jax import cache, fused, trellis
from turboquant_jax.attention import attend_pallas
from turboquant_jax.cache import compression
from turboquant_jax.cache.state import Exact
from turboquant_jax.segments import PLAIN


def lower(function, *arguments):
    """StableHLO text for CUDA. From 0.11 jax must be told which GPU it lowers for."""
    traced = jax.jit(function).trace
    if not hasattr(jax.sharding, "AbstractDevice"):
        return traced(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return traced(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def shapes(bits, batch, max_pages, channels=128, tokens=64, heads=32, kv_heads=8, code="scalar"):
    """(q, blocks, table, lengths) as shapes."""
    counts = [2 ** (b + (code == "trellis")) for b in bits]
    books = [
        Codebook(b, tuple(i - n // 2 for i in range(n)), 0.1, code)
        for b, n in zip(bits, counts, strict=True)
    ]
    pages, new = batch * max_pages, jax.ShapeDtypeStruct
    rows = (pages, kv_heads, tokens), (pages, kv_heads, channels)
    blocks = Blocks(
        tuple(new((*rows[0], channels * w // 8), jnp.uint8) for w in books[0].widths),
        tuple(new((*rows[1], tokens * w // 8), jnp.uint8) for w in books[1].widths),
        new(rows[0], jnp.uint32),
        *books,
    )
    q = new((batch, heads, channels), jnp.bfloat16)
    return q, blocks, new((batch, max_pages), jnp.int32), new((batch,), jnp.int32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", BITS)
def test_benchmark_lowers(bits, shape):
    """As the benchmark calls it."""
    if shape not in (SHAPES[0], SHAPES[-1]) and bits != BITS[0]:
        pytest.skip("the same kernel with other sizes")
    schedule = schedule_of(bits, shape)
    text = lower(
        lambda *a: attend.__wrapped__(*a, schedule), *shapes(bits, shape[0], shape[1] // 64)
    )
    assert "decode_attention" in text and "decode_combine" in text


@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_trellis_lowers(bits, channels):
    """The presets' codes, and the search for them."""
    arguments = shapes(bits, 2, 8, channels, code="trellis")
    assert "decode_attention" in lower(lambda *a: attend.__wrapped__(*a), *arguments)
    levels = tuple(float(x) for x in trellis.grid_levels(bits[0]))
    rows = jax.ShapeDtypeStruct((channels, 100), jnp.float32)
    assert "trellis_encode" in lower(lambda y: trellis_kernel.encode(y, levels), rows)


@pytest.mark.parametrize(("bits", "channels", "tokens"), [((8, 5), 64, 32), ((3, 1), 80, 128)])
def test_options_lower(bits, channels, tokens):
    """Wide codes, odd dims and every option."""
    q, blocks, table, lengths = shapes(bits, 2, 4, channels, tokens, heads=8, kv_heads=2)
    new = jax.ShapeDtypeStruct
    pages = blocks.scales.shape
    sketch = Sketch(
        new((2, 8, 64), jnp.float32), new((*pages, 8), jnp.uint8), new(pages, jnp.bfloat16)
    )
    sinks = new((8,), jnp.float32)

    def call(q, blocks, table, lengths, sketch, sinks):
        held = PagedBlocks((blocks,), table, lengths)
        return decode_attention(q, held, Softmax(0.1, 30.0, sinks), sketch=sketch)

    assert "decode_attention" in lower(call, q, blocks, table, lengths, sketch, sinks)


@pytest.mark.parametrize(
    ("bits", "head_dim", "rotation", "dtype"),
    [
        (4, 128, "hadamard", "bfloat16"),
        (2, 96, "block_hadamard", "float32"),
        (8, 80, "haar", "bfloat16"),
    ],
)
def test_a_step_and_a_chunk_of_a_cache_lower(bits, head_dim, rotation, dtype):
    """A decoding step over all segments, compression of its block and of a chunk's, decoding."""
    codec = cache.CodecConfig(bits, rotation)
    config = cache.CacheConfig(2, 2, head_dim, codec, codec, window=64, dtype=dtype)
    state = jax.eval_shape(lambda: cache.create(config, 3, 1024, key=jax.random.key(0)))

    def new(count, heads):
        return jax.ShapeDtypeStruct((3, count, heads, head_dim), jnp.dtype(dtype))

    def step(state, q, k, v):
        out, state = attend_pallas(state, jnp.int32(1), q, k, v, PLAIN, None, write=True)
        return out, compression.compress_single(state, use_kernel=True)

    def chunk(state, k, v):
        compressed = compression.compress_chunk(state, jnp.int32(1), Exact(k, v), use_kernel=True)
        return fused.decode(compressed, jnp.int32(1), compressed.page_table, jnp.arange(1))

    def projected(state, qkv, angle):
        *token, rotated = fused.turn(state, jnp.int32(1), qkv, jnp.cos(angle), jnp.sin(angle))
        token = (x[:, None] for x in token)
        return attend_pallas(state, jnp.int32(1), *token, PLAIN, None, write=True, rotated=rotated)

    text = lower(step, state, new(1, 8), new(1, 2), new(1, 2))
    assert all(name in text for name in ("decode_attention", "decode_combine", "encode"))
    if dtype == "bfloat16":
        angle = jax.ShapeDtypeStruct((3, head_dim // 2), jnp.float32)
        text = lower(projected, state, new(2, 6), angle)
        assert "rope_and_rotate" in text and "rotate_queries" not in text
    text = lower(chunk, state, new(200, 2), new(200, 2))
    assert "encode" in text and "decode" in text
