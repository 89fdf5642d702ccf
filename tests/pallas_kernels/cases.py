"""Calls that the benchmark and a decoder make of the kernels, as functions and shapes.

`lower` lowers them for CUDA on a machine without a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.speed import calibrated_blocks, decode_speed
from experiments.speed.decode_schedules import schedule_of
from experiments.speed.decode_speed import BITS, SHAPES, TRELLIS_BITS, attend
from pallas_kernels.decode_attention import (
    BlocksOperand,
    CodebookOperand,
    PagedBlocks,
    Sketch,
    Softmax,
    decode_attention,
)
from pallas_kernels.trellis import encode
from tests.layout import calibration
from turboquant_jax import cache
from turboquant_jax.attention import PLAIN, Projection, triton
from turboquant_jax.cache import compression
from turboquant_jax.cache.choose import Compression
from turboquant_jax.cache.state import Exact, rows_of
from turboquant_jax.quantizers import trellis

new = jax.ShapeDtypeStruct


@dataclass(frozen=True)
class Case:
    """A function of arguments known by their shapes, and the kernels that it must contain."""

    function: Callable
    arguments: tuple
    kernels: tuple[str, ...] = ("decode_attention", "decode_combine")
    absent: tuple[str, ...] = ()


def lower(function, *arguments):
    """Lowered for CUDA. From 0.11 jax must be told which GPU it lowers for."""
    traced = jax.jit(function).trace
    if not hasattr(jax.sharding, "AbstractDevice"):
        return traced(*arguments).lower(lowering_platforms=("cuda",))
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return traced(*arguments).lower(lowering_platforms=("cuda",))


def shapes(bits, batch, max_pages, channels=128, tokens=64, heads=32, kv_heads=8, code="scalar"):
    """(q, blocks, table, lengths) as shapes."""
    counts = [2 ** (b + (code == "trellis")) for b in bits]
    books = [
        CodebookOperand(b, tuple(i - n // 2 for i in range(n)), 0.1, code)
        for b, n in zip(bits, counts, strict=True)
    ]
    pages = batch * max_pages
    rows = (kv_heads, pages, tokens), (kv_heads, pages, channels)
    blocks = BlocksOperand(
        (tuple(new((*rows[0], channels * w // 8), jnp.uint8) for w in books[0].widths),),
        (tuple(new((*rows[1], tokens * w // 8), jnp.uint8) for w in books[1].widths),),
        (new(rows[0], jnp.uint32),),
        *((book,) for book in books),
    )
    q = new((batch, heads, channels), jnp.bfloat16)
    return q, blocks, new((batch, max_pages), jnp.int32), new((batch,), jnp.int32)


def _benchmark(bits, shape) -> Case:
    """As the benchmark calls it."""
    schedule = schedule_of(bits, shape)
    arguments = shapes(bits, shape[0], shape[1] // 64)
    return Case(lambda *a: attend.__wrapped__(*a, schedule), arguments)


def _search(bits, channels) -> Case:
    """The search for a trellis code."""
    levels = tuple(float(x) for x in trellis.grid_levels(bits[0]))
    rows = new((channels, 100), jnp.float32)
    return Case(lambda y: encode(y, levels), (rows,), ("trellis_encode",))


def _options(bits, channels, tokens) -> Case:
    """Wide codes, odd dims and every option."""
    q, blocks, table, lengths = shapes(bits, 2, 4, channels, tokens, heads=8, kv_heads=2)
    pages = blocks.scales[0].shape
    sketch = Sketch(
        new((2, 8, 64), jnp.float32), new((*pages, 8), jnp.uint8), new(pages, jnp.bfloat16)
    )

    def call(q, blocks, table, lengths, sketch, sinks):
        held = PagedBlocks((blocks,), table, lengths)
        return decode_attention(q, held, Softmax(0.1, 30.0, sinks), sketch=sketch)

    arguments = q, blocks, table, lengths, sketch, new((8,), jnp.float32)
    return Case(call, arguments, ("decode_attention",))


def of_cache(
    bits, head_dim, rotation, dtype, frequencies=None, key_code="scalar", **changes
) -> dict[str, Case]:
    """A decoding step over all segments, a commit, a chunk's compression and its decoding."""
    codec = cache.CodecConfig(bits, rotation)
    key = replace(codec, code=key_code)
    config = cache.CacheConfig(
        2, 2, head_dim, key, codec, window=64, dtype=dtype, rope_frequencies=frequencies
    )
    config = replace(config, **changes)
    state = jax.eval_shape(
        lambda: cache.create(
            config, 3, 1024, key=jax.random.key(0), calibration=calibration(config)
        )
    )

    by = Compression("pallas", "pallas")

    def tokens(count, heads):
        return new((3, count, heads, head_dim), jnp.dtype(dtype))

    def step(state, q, k, v):
        return triton.attend(state, rows_of(state, 1), (q, k, v), PLAIN, None, write=True)

    def commit(state):
        return compression.compress_single(state, by)

    def chunk(state, k, v):
        rows = rows_of(state, 1)
        state = compression.compress_chunk(state, rows, Exact(k, v), by)
        return triton.decode_pages(state, rows, state.table.page_table, np.arange(1))

    def projected(state, qkv, angle):
        projection = Projection(qkv, jnp.cos(angle), jnp.sin(angle))
        rows = rows_of(state, 1)
        heads, rotated = triton.turn(state, rows, projection)
        return triton.attend(state, rows, heads, PLAIN, None, write=True, rotated=rotated)

    found = {
        "step": Case(step, (state, tokens(1, 8), tokens(1, 2), tokens(1, 2))),
        "commit": Case(commit, (state,), ("encode",)),
        "chunk": Case(chunk, (state, tokens(200, 2), tokens(200, 2)), ("encode", "decode")),
    }
    if dtype == "bfloat16":
        angle = new((3, 1, head_dim // 2), jnp.float32)
        kernels = ("rope_and_rotate", "decode_attention")
        found["projected step"] = Case(
            projected,
            (state, new((3, 1, 2, 6, head_dim), jnp.bfloat16), angle),
            kernels,
            ("rotate_queries",),
        )
    return found


CACHES = (
    (4, 128, "hadamard", "bfloat16"),
    (2, 96, "block_hadamard", "float32"),
    (8, 80, "haar", "bfloat16"),
)


def _before_rope(heads) -> Case:
    """A decoding step over keys whose mean turns, with so many query heads a kv head."""
    case = of_cache(4, 128, "hadamard", "bfloat16", (1.0, 0.1))["step"]
    state, query, *new_token = case.arguments
    query = new((*query.shape[:2], 2 * heads, 128), query.dtype)
    return Case(case.function, (state, query, *new_token))


def _calibrated(head_dim) -> Case:
    """A decoding step over keys in groups of channels, whose mean turns."""
    quarter = head_dim // 4
    groups = (quarter, 4), (quarter, 2), (2 * quarter, 1)
    keys = cache.CodecConfig(groups, scales="joint")
    return of_cache(2, head_dim, "hadamard", "bfloat16", (1.0, 0.1), key=keys)["step"]


def _seven_times(name) -> Case:
    """As the benchmark calls it: heads of four calibrated formats, whose mean turns."""
    case = decode_speed.Case(name, calibrated_blocks.MIXES[name].bits, SHAPES[1], mean="pre_rope")
    q, (held, *_) = jax.eval_shape(case.make)
    return Case(case.step, (q, *held))


def _formats(part) -> Case:
    """Heads of two formats in a layer; what compresses them is XLA."""
    bits = cache.Allocation((4, (2, 3)), (2, (2, 2)))
    found = of_cache(4, 128, "hadamard", "bfloat16", allocation=bits)
    if part != "pages":
        return found[part]

    def pages(state):
        rows = rows_of(state, 1)
        return triton.decode_pages(state, rows, state.table.page_table, np.arange(2))

    return Case(pages, found["commit"].arguments, ("decode",))


def _uncoded(side) -> Case:
    """A decoding step over keys, or values, that blocks hold in full precision."""
    full = {side: cache.CodecConfig(16)}
    return of_cache(4, 128, "hadamard", "bfloat16", (1.0, 0.1), **full)["step"]


def _uncoded_pages() -> Case:
    """Pages whose keys are in full precision, decoded."""
    case = _uncoded("key")
    pages = partial(triton.decode_pages, heads=np.arange(2))
    call = lambda state: pages(state, rows_of(state, 1), state.table.page_table)  # noqa: E731
    return Case(call, case.arguments[:1], ("decode",))


def _name(*parts) -> str:
    return " ".join("x".join(map(str, p)) if isinstance(p, tuple) else str(p) for p in parts)


MAKERS: dict[str, Callable[[], Case]] = {
    **{
        _name("attend", bits, shape): partial(_benchmark, bits, shape)
        for bits in BITS
        for shape in SHAPES
        if shape in (SHAPES[0], SHAPES[-1]) or bits == BITS[0]  # else: the same, other sizes
    },
    **{
        _name("trellis", bits, channels): (
            lambda bits=bits, channels=channels: Case(
                lambda *a: attend.__wrapped__(*a),
                shapes(bits, 2, 8, channels, code="trellis"),
                ("decode_attention",),
            )
        )
        for bits in TRELLIS_BITS
        for channels in (64, 128)
    },
    **{
        _name("search", bits[0], channels): partial(_search, bits, channels)
        for bits in TRELLIS_BITS
        for channels in (64, 128)
    },
    "options 8x5": partial(_options, (8, 5), 64, 32),
    "options 3x1": partial(_options, (3, 1), 80, 128),
    # the most shared memory
    "8x5, 4 new tokens": lambda: Case(
        lambda *a: attend.__wrapped__(*a), shapes((8, 5), 3, 4, 80, 32, heads=24, kv_heads=2)
    ),
    **{
        _name("cache", *setting, part): (
            lambda setting=setting, part=part: of_cache(*setting)[part]
        )
        for setting in CACHES
        for part in ("step", "commit", "chunk", "projected step")
        if part != "projected step" or setting[3] == "bfloat16"
    },
    **{f"groups {channels}": partial(_calibrated, channels) for channels in (64, 128)},
    **{f"formats {part}": partial(_formats, part) for part in ("step", "projected step", "pages")},
    **{f"{side} of 16 bits": partial(_uncoded, side) for side in ("key", "value")},
    "pages with keys of 16 bits": _uncoded_pages,
    **{name: partial(_seven_times, name) for name in ("pallas-7x", "pallas-7x-scalar")},
    **{
        f"scales of 8 bits {part}": (
            lambda part=part: of_cache(4, 128, "hadamard", "bfloat16", scale_bits=8)[part]
        )
        for part in ("step", "commit")
    },
    "prod step": lambda: of_cache(4, 128, "hadamard", "bfloat16", key_code="prod")["step"],
    **{f"mean before RoPE {heads}": partial(_before_rope, heads) for heads in (4, 7, 8, 16)},
    "8 new tokens": lambda: Case(
        lambda *a: attend.__wrapped__(*a), shapes((4, 4), 8, 512, heads=256)
    ),
}
