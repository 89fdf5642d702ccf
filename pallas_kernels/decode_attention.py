"""Decode attention over blocks of compressed keys and values: the public function.

Everything lives in the rotated space: the queries come rotated, the output is to be rotated back.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8, UInt32

from pallas_kernels import triton
from pallas_kernels.codebook import Codebook
from pallas_kernels.combine import combine
from pallas_kernels.decode_kernel import LOG2E, Plan, decode_kernel
from pallas_kernels.gather import key_decoder, value_decoders

# Programs that fill an H100 (132 multiprocessors) in one wave; measured, see docs/kernels.md.
PROGRAMS = 1024
# A split of fewer tiles than this spends its time on starting and on being merged.
MIN_TILES = 4
# Tokens of a tile: as many pages as it takes.
TILE_TOKENS = 128
MAX_HEADS = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """Pages of T compressed tokens for one group of H channels (all of them, or a mixed-bit group).

    keys: planes uint8 [pages, K, T, H*w/8], packed along the channels; values: planes uint8
    [pages, K, H, T*w/8], packed along the tokens of the page; scales: uint32 [pages, K, T], the bf16
    scale of the value << 16 | that of the key. A value is scale * step * level[code].
    """

    keys: tuple[UInt8[Array, "pages K T _"], ...]
    values: tuple[UInt8[Array, "pages K H _"], ...]
    scales: UInt32[Array, "pages K T"]
    key_codebook: Codebook = dataclasses.field(metadata=dict(static=True))
    value_codebook: Codebook = dataclasses.field(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sketch:
    """Correction of the scores by signs of projected residuals: + norm * sum(sign * query).

    query [B, N, M], projected and scaled by the caller; signs: the plane uint8 [pages, K, T, M/8] of a
    1-bit code (1 is +1, 0 is -1) packed along the projections; norms [pages, K, T].
    """

    query: Float[Array, "B N M"]
    signs: UInt8[Array, "pages K T _"]
    norms: Float[Array, "pages K T"]


SIGNS = Codebook(bits=1, levels=(-1, 1), step=1.0)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the work is cut: splits of a sequence, pages of a tile, warps and stages of a program."""

    splits: int
    pages: int
    warps: int
    stages: int


def default_schedule(batch: int, kv_heads: int, tokens: int, max_pages: int) -> Schedule:
    """From the shapes alone, so that results do not hang on lengths or on the device's load."""
    pages = max(1, TILE_TOKENS // tokens)
    tiles = -(-max_pages // pages)
    splits = min(PROGRAMS // (batch * kv_heads), tiles // MIN_TILES)
    return Schedule(splits=max(1, splits), pages=pages, warps=2, stages=3)


def decode_attention(
    q: Float[Array, "B N H"],
    groups: tuple[Blocks, ...],
    page_table: Int[Array, "B max_pages"],
    lengths: Int[Array, " B"],
    *,
    sm_scale: float,
    starts: Int[Array, " B"] | None = None,
    soft_cap: float | None = None,
    sink_logits: Float[Array, " N"] | None = None,
    score_bias: Float[Array, "B N"] | None = None,
    sketch: Sketch | None = None,
    schedule: Schedule | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N"]]:
    """One query token per sequence against its compressed tokens: (output, log-sum-exp), float32.

    q [B, N, H]: rotated queries; N a multiple of the K kv heads, at most 16 times as many; the channels
    of the `groups` follow each other in q and in the output. Sequence b has `lengths[b]` tokens in the
    pages `page_table[b]`; those before `starts[b]` are not seen (sliding window). Table entries past the
    last page are never used.

    score = sm_scale * q.k + score_bias, then soft_cap * tanh(score / soft_cap) if given. `sink_logits`
    add exp(sink) to the softmax denominator. The log-sum-exp is in nats, -inf for a sequence of no
    tokens, whose output is 0; parts merge by it. Queries and probabilities enter the products as 15-bit
    integers, levels are exact and sums are float32 or exact.

    `interpret` runs the kernel on any device in Python. Raises ValueError for shapes that do not fit,
    NotImplementedError for what the kernel does not serve.
    """
    batch, heads, channels = q.shape
    kv_heads, tokens = check(q, groups, page_table, lengths)
    if schedule is None:
        schedule = default_schedule(batch, kv_heads, tokens, page_table.shape[1])
    per_head = heads // kv_heads
    plan = make_plan(groups, sketch, per_head, tokens, sm_scale, soft_cap, schedule, interpret)
    grouped = lambda x: x.reshape(batch, kv_heads, per_head, *x.shape[2:])  # noqa: E731
    inputs: dict[str, Any] = {
        "queries": [grouped(q)] + ([grouped(sketch.query)] if sketch else []),
        "keys": [g.keys for g in groups] + ([(sketch.signs,)] if sketch else []),
        "values": [g.values for g in groups],
        "scales": [g.scales for g in groups] + ([sketch.norms] if sketch else []),
        "key_tables": [part[0].tables() for part in plan.key_parts],
        "value_tables": [decoder.tables() for decoder in plan.value_decoders],
        "page_table": page_table,
        "lengths": lengths,
    }
    if starts is not None:
        inputs["starts"] = starts
    if score_bias is not None:
        bias = score_bias.astype(jnp.float32) * (1.0 if soft_cap is not None else LOG2E)
        inputs["bias"] = grouped(bias)
    parts = run(plan, inputs, batch, kv_heads, channels)
    sinks = None
    if sink_logits is not None:
        sinks = sink_logits.astype(jnp.float32).reshape(kv_heads, per_head)
    out, lse = combine(parts, sinks, per_head, interpret)
    return out.reshape(q.shape), lse.reshape(batch, heads)


def make_plan(
    groups: tuple[Blocks, ...],
    sketch: Sketch | None,
    heads: int,
    tokens: int,
    sm_scale: float,
    soft_cap: float | None,
    schedule: Schedule,
    interpret: bool,
) -> Plan:
    """The static half of a call."""
    base = 1.0 if soft_cap is not None else LOG2E
    key_parts, first = [], 0
    for group in groups:
        count = group.values[0].shape[2]
        decoder = key_decoder(group.key_codebook, count)
        key_parts.append((decoder, 0, first, sm_scale * base * group.key_codebook.step))
        first += count
    if sketch is not None:
        decoder = key_decoder(SIGNS, sketch.query.shape[-1])
        key_parts.append((decoder, 1, 0, sm_scale * base))
    codebooks = tuple(group.value_codebook for group in groups)
    return Plan(
        tokens=tokens,
        pages=schedule.pages,
        heads=heads,
        key_parts=tuple(key_parts),
        value_decoders=value_decoders(codebooks, tokens, schedule.pages),
        value_channels=tuple(group.values[0].shape[2] for group in groups),
        soft_cap=soft_cap,
        splits=schedule.splits,
        warps=schedule.warps,
        stages=schedule.stages,
        interpret=interpret,
    )


def run(
    plan: Plan, inputs: dict[str, Any], batch: int, kv_heads: int, channels: int
) -> dict[str, jax.Array]:
    """Calls the kernel on the grid (splits, kv heads, sequences)."""
    splits, columns = plan.splits, plan.columns

    def paged(x):  # the whole pool of one kv head
        return triton.BlockSpec(
            (x.shape[0], None, *x.shape[2:]), lambda i, h, j: (0, h) + (0,) * (x.ndim - 2)
        )

    def of_head(x):
        return triton.BlockSpec(
            (None, None, *x.shape[2:]), lambda i, h, j: (j, h) + (0,) * (x.ndim - 2)
        )

    def of_sequence(x):
        block = (1,) if x.ndim == 1 else (None, *x.shape[1:])
        return triton.BlockSpec(block, lambda i, h, j: (j,) + (0,) * (x.ndim - 1))

    def shared(x):
        return triton.BlockSpec(x.shape, lambda i, h, j: (0,) * x.ndim)

    kinds = {"queries": of_head, "keys": paged, "values": paged, "scales": paged, "bias": of_head}
    kinds |= {"key_tables": shared, "value_tables": shared}
    in_specs = {
        name: jax.tree.map(kinds.get(name, of_sequence), value) for name, value in inputs.items()
    }
    shapes = {"peak": (columns,), "weight": (columns,), "sums": (channels, columns)}
    return triton.call(
        lambda inputs, outputs: decode_kernel(inputs, outputs, plan=plan),
        grid=(splits, kv_heads, batch),
        in_specs=(in_specs,),
        out_specs={
            name: triton.BlockSpec(
                (None, None, None, *shape), lambda i, h, j, n=len(shape): (j, h, i) + (0,) * n
            )
            for name, shape in shapes.items()
        },
        out_shape={
            name: jax.ShapeDtypeStruct((batch, kv_heads, splits, *shape), jnp.float32)
            for name, shape in shapes.items()
        },
        warps=plan.warps,
        stages=plan.stages,
        name="decode_attention",
        interpret=plan.interpret,
    )(jax.tree.map(jnp.asarray, inputs))


def check(
    q: jax.Array, groups: tuple[Blocks, ...], page_table: jax.Array, lengths: jax.Array
) -> tuple[int, int]:
    """(kv heads, tokens of a page), after the shapes were seen to fit."""
    if not groups:
        raise ValueError("got no groups of blocks, expected at least one")
    batch, heads, channels = q.shape
    pages, kv_heads, tokens = groups[0].scales.shape
    if tokens not in (32, 64, 128):
        raise NotImplementedError(f"pages of {tokens} tokens: served are 32, 64 and 128")
    if heads % kv_heads:
        raise ValueError(f"got {heads} query heads, expected a multiple of {kv_heads} kv heads")
    if heads // kv_heads > MAX_HEADS:
        raise NotImplementedError(
            f"{heads // kv_heads} query heads per kv head: served are up to {MAX_HEADS}"
        )
    if page_table.shape[0] != batch or lengths.shape != (batch,):
        raise ValueError(
            f"got page_table {page_table.shape} and lengths {lengths.shape}, expected {batch} rows"
        )
    total = 0
    for group in groups:
        count = group.values[0].shape[2] if group.values else 0
        check_planes("keys", group.keys, group.key_codebook, (pages, kv_heads, tokens), count)
        check_planes("values", group.values, group.value_codebook, (pages, kv_heads, count), tokens)
        if group.scales.shape != (pages, kv_heads, tokens) or group.scales.dtype != jnp.uint32:
            raise ValueError(
                f"got scales {group.scales.dtype}{list(group.scales.shape)}, "
                f"expected uint32{[pages, kv_heads, tokens]}"
            )
        total += count
    if total != channels:
        raise ValueError(f"got queries of {channels} channels, expected the groups' {total}")
    return kv_heads, tokens


def check_planes(
    name: str,
    planes: tuple[jax.Array, ...],
    codebook: Codebook,
    rows: tuple[int, ...],
    length: int,
) -> None:
    """Raises where planes do not hold codes of `length` elements in `rows`."""
    expected = [(*rows, length * width // 8) for width in codebook.widths]
    got = [plane.shape for plane in planes]
    if got != expected or length % 8:
        raise ValueError(f"got {name} planes {got} for {length} elements, expected {expected}")
    for plane in planes:
        if plane.dtype != jnp.uint8:
            raise ValueError(f"got {name} of {plane.dtype}, expected uint8")
        # Triton's offsets are signed 32-bit numbers up to 2**32 bytes, 64-bit ones from there on.
        if 2**31 < plane.size <= 2**32:
            raise NotImplementedError(
                f"a {name} plane of {plane.size} bytes: served are up to 2**31 bytes and more than "
                "2**32; split the pool"
            )
