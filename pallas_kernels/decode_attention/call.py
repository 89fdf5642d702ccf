"""Decode attention over blocks of compressed keys and values: the call.

Everything lives in the rotated space: the queries come rotated, the output is to be rotated back.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_attention.combine import combine
from pallas_kernels.decode_attention.inputs import Sketch, check
from pallas_kernels.decode_attention.kernel import decode_kernel
from pallas_kernels.decode_attention.recent import LOG2E, Recent, check_recent
from pallas_kernels.decode_attention.schedule import TILE_TOKENS, Schedule, default_schedule
from pallas_kernels.decode_attention.scores import Plan
from pallas_kernels.primitives import triton
from pallas_kernels.primitives.blocks import Blocks
from pallas_kernels.primitives.codebook import Codebook
from pallas_kernels.primitives.gather import key_decoder, value_decoders
from pallas_kernels.primitives.rotation import Rotation

SIGNS = Codebook(bits=1, levels=(-1, 1), step=1.0)


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
    layer: Int[Array, ""] | None = None,
    layers: int = 1,
    recent: Recent | None = None,
    rotation: Rotation | None = None,
    dtype: DTypeLike = jnp.float32,
    schedule: Schedule | None = None,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N"], Recent | None]:
    """One query token per sequence against its tokens: output, log-sum-exp, `recent` as it is then.

    q [B, N, H]: rotated queries; N a multiple of the K kv heads, at most 16 times as many; the
    channels of the `groups` follow each other in q and in the output. Sequence b has `lengths[b]`
    tokens in blocks; block j lies in the page that `page_table[b]` has in slot j modulo its slots.
    Those before `starts[b]` are not seen (sliding window). Slots of unseen blocks are never used.

    score = sm_scale * q.k + score_bias, then soft_cap * tanh(score / soft_cap) if given.
    `sink_logits` add exp(sink) to the softmax denominator. The log-sum-exp is in nats, -inf for
    a sequence of no tokens, whose output is 0; parts merge by it. Queries and probabilities
    enter the products as 15-bit integers, levels are exact and sums are float32 or exact.

    `recent`: further tokens, in full precision; returned with the newest written where it says, in
    place if the caller gives the arrays away. Then `recent.places` says which tokens of the blocks
    are seen, and `lengths` are whatever it takes. `rotation`, of the values: its transpose
    multiplies the output of the blocks, so that it leaves the rotated space, where those of
    `recent` never were; without it everything is in one space. `layer`: the pool, and the rows of
    `recent`, are those of so many `layers` one after another. The output has `dtype`, the
    log-sum-exp float32.

    Raises ValueError for shapes that do not fit, NotImplementedError for what the kernel does not
    serve.
    """
    batch, heads, channels = q.shape
    kv_heads, tokens = check(q, groups, page_table, lengths)
    if recent is not None:
        check_recent(recent, batch, heads, kv_heads, layers)
        if starts is not None:
            raise ValueError("got starts beside recent tokens, whose places say what is seen")
    if rotation is not None and rotation.parts.shape[1:] not in [
        (n, channels, channels) for n in (1, kv_heads)
    ]:
        raise ValueError(
            f"got parts of a rotation {rotation.parts.shape}, expected "
            f"[parts, 1 or {kv_heads}, {channels}, {channels}]"
        )
    per_head = heads // kv_heads
    if schedule is None:
        schedule = default_schedule(
            batch=batch,
            kv_heads=kv_heads,
            heads=per_head,
            channels=max(group.values[0].shape[2] for group in groups),
            bits=max(max(g.key_codebook.bits, g.value_codebook.bits) for g in groups),
            tokens=tokens,
            max_pages=page_table.shape[1],
            recent=0 if recent is None else sum(x.shape[1] for x in recent.keys),
        )
    if schedule.pages * tokens < TILE_TOKENS:
        raise ValueError(
            f"got tiles of {schedule.pages} pages of {tokens} tokens, "
            f"expected at least {TILE_TOKENS} tokens"
        )
    plan = make_plan(
        groups, sketch, per_head, tokens, sm_scale, soft_cap, schedule,
        batch=batch, layers=layers, recent=recent is not None,
    )  # fmt: skip
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
    if recent is not None:
        inputs["recent"] = dataclasses.replace(recent, query=grouped(recent.query))
    if layer is not None:
        inputs["layer"] = jnp.asarray(layer, jnp.int32).reshape(1)
    if starts is not None:
        inputs["starts"] = starts
    if score_bias is not None:
        bias = score_bias.astype(jnp.float32) * (1.0 if soft_cap is not None else LOG2E)
        inputs["bias"] = grouped(bias)
    parts, stored = run(plan, inputs, kv_heads, channels)
    sinks = None
    if sink_logits is not None:
        sinks = sink_logits.astype(jnp.float32).reshape(kv_heads, per_head)
    out, lse = combine(parts, sinks, rotation, per_head, dtype)
    if recent is not None and stored is not None:
        recent = dataclasses.replace(
            recent,
            keys=(*stored[0], recent.keys[-1]),
            values=(*stored[1], recent.values[-1]),
        )
    return out.reshape(q.shape), lse.reshape(batch, heads), recent


def make_plan(
    groups: tuple[Blocks, ...],
    sketch: Sketch | None,
    heads: int,
    tokens: int,
    sm_scale: float,
    soft_cap: float | None,
    schedule: Schedule,
    *,
    batch: int,
    layers: int,
    recent: bool,
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
        scale=sm_scale * base,
        soft_cap=soft_cap,
        batch=batch,
        layer_pages=groups[0].scales.shape[0] // layers,
        recent_tiles=schedule.recent_tiles if recent else 0,
        splits=schedule.splits,
        warps=schedule.warps,
        stages=schedule.stages,
    )


def run(
    plan: Plan, inputs: dict[str, Any], kv_heads: int, channels: int
) -> tuple[dict[str, Any], tuple | None]:
    """Calls the kernel on the grid (splits, kv heads, sequences)."""
    batch, splits, columns = plan.batch, plan.splits, plan.columns

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

    def segment(x):  # of one kv head, whatever the row
        return triton.BlockSpec(
            (*x.shape[:-2], None, x.shape[-1]), lambda i, h, j: (0,) * (x.ndim - 2) + (h, 0)
        )

    kinds = {"queries": of_head, "keys": paged, "values": paged, "scales": paged, "bias": of_head}
    kinds |= {"key_tables": shared, "value_tables": shared, "layer": shared}
    in_specs = {
        name: jax.tree.map(kinds.get(name, of_sequence), value)
        for name, value in inputs.items()
        if name != "recent"
    }
    shapes = {"peak": (columns,), "weight": (columns,), "sums": (channels, columns)}

    def of_part(shape, *lead):  # of a split, or of the recent tokens
        return jax.ShapeDtypeStruct((batch, kv_heads, *lead, *shape), jnp.float32)

    out_shape: dict[str, Any] = {name: of_part(shape, splits) for name, shape in shapes.items()}
    out_specs: dict[str, Any] = {
        name: triton.BlockSpec(
            (None, None, None, *shape),
            lambda i, h, j, shape=shape: (j, h, i) + (0,) * len(shape),
        )
        for name, shape in shapes.items()
    }
    if "recent" in inputs:
        recent = inputs["recent"]
        in_specs["recent"] = Recent(
            query=of_head(recent.query),
            keys=tuple(segment(x) for x in recent.keys),
            values=tuple(segment(x) for x in recent.values),
            pending=of_sequence(recent.pending),
            places=recent.places,
            key_mean=None if recent.key_mean is None else segment(recent.key_mean),
            write=recent.write,
        )
        out_shape["recent"] = {name: of_part(shape) for name, shape in shapes.items()}
        out_specs["recent"] = jax.tree.map(of_head, out_shape["recent"])
        if recent.write:
            for name in ("keys", "values"):
                stored = getattr(recent, name)[:-1]
                out_specs[name] = tuple(segment(x) for x in stored)
                out_shape[name] = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in stored)
    inputs = jax.tree.map(jnp.asarray, inputs)
    outputs = triton.call(
        lambda inputs, outputs: decode_kernel(inputs, outputs, plan=plan),
        grid=(splits, kv_heads, batch),
        in_specs=(in_specs,),
        out_specs=out_specs,
        out_shape=out_shape,
        aliases=_aliases(inputs, out_shape),
        warps=plan.warps,
        stages=plan.stages,
        name="decode_attention",
    )(inputs)
    stored = (outputs.pop("keys"), outputs.pop("values")) if "keys" in outputs else None
    return outputs, stored


def _aliases(inputs: dict[str, Any], outputs: dict[str, Any]) -> dict[int, int]:
    """Which flat input is overwritten by which flat output: the segments that are written to."""
    if "keys" not in outputs:
        return {}

    def places(tree: Any, root: str, field: str) -> list[int]:
        paths = [
            jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)
        ]
        return [i for i, path in enumerate(paths) if path.startswith(f"{root}{field}[")]

    return {
        i: o
        for name in ("keys", "values")
        for i, o in zip(
            places(inputs, "['recent']", f".{name}"), places(outputs, "", f"['{name}']"),
            strict=False,  # but for the segment of the newest token
        )
    }  # fmt: skip
