"""Merges the splits of a sequence by their log-sum-exp, in one kernel where XLA makes four.

In two, where a rotation wants all channels of more splits than the registers of a program hold.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.decode_attention.exact import EMPTY, LOG2E
from pallas_kernels.primitives import triton
from pallas_kernels.primitives.dequantize import power_of_two
from pallas_kernels.primitives.rotation import RotationOperand, load_parts, unrotate

# Elements of a tile of partial sums that one program holds in registers.
TILE = 8192
# As many has a program, if that leaves it 16 rows of channels: many small ones are quicker.
FEW = 2048
# Query heads of a program: of more there are several, so that few sequences occupy the device.
HEADS = 8


def combine_kernel(
    inputs: dict[str, Any],
    outputs: dict[str, Any],
    *,
    gain: float,
    heads: int,
    rows: int,
) -> None:
    """One program of the grid (slice of channels and of heads, kv head, sequence).

    Split i has sums [splits, channels, columns], weight and peak [splits, columns]: its output is
    2**peak * sums, its softmax denominator 2**peak * weight. The splits are multiplied by the
    transpose of `rotation`, where there is one; `exact`, a part like a split, is not.

    Outputs are `out` and `lse`, or those of a part. Of splits that are one tile everything is
    loaded before the first use, so that there is one wait for memory, and in the layout of the
    sums, each row of channels with peaks and weights of its own: they are read again rather than
    sent from thread to thread.
    """
    splits, channels, columns = inputs["sums"].shape
    slices, part = columns // HEADS, triton.program_id(0)
    if slices > 1:
        columns, head = HEADS, lax.rem(part, slices) * HEADS + jnp.arange(HEADS)
        part = lax.div(part, slices)
    else:
        head = jnp.arange(columns)
    channel = part * rows + jnp.arange(rows)
    inside = channel < channels

    def load(name: str, at: jax.Array, other: float) -> jax.Array:
        """[len(at), rows, columns]."""
        row = (channel,) if name == "sums" else ()
        place = (at[:, None, None], *(x[None, :, None] for x in row), head[None, None, :])
        exists = jnp.broadcast_to((at < splits)[:, None, None], (at.shape[0], rows, columns))
        exists = exists & inside[None, :, None] if row else exists
        place = tuple(jnp.broadcast_to(x, exists.shape) for x in place)
        return triton.load(inputs[name].at[place], mask=exists, other=other)

    def load_exact(name: str) -> jax.Array:
        row = (channel[:, None],) if name == "sums" else ()
        place = tuple(jnp.broadcast_to(x, (rows, columns)) for x in (*row, head[None, :]))
        exists = jnp.broadcast_to(inside[:, None], (rows, columns))
        return triton.load(inputs["exact"][name].at[place], mask=exists, other=0.0)

    step = min(power_of_two(splits), max(1, TILE // (rows * columns)))
    turns, others = -(-splits // step), {"peak": EMPTY, "sums": 0.0, "weight": 0.0}

    def tile(i: Any, names: Iterable[str]) -> dict[str, jax.Array]:
        at = i * step + jnp.arange(step)
        return {name: load(name, at, others[name]) for name in names}

    held = tile(0, others)
    matrices = []
    if "rotation" in inputs:
        matrices = load_parts(inputs["rotation"], channel, channel, channels)
    top = held["peak"].max(axis=0)
    if turns > 1:  # more than the registers hold
        top = lax.fori_loop(
            1, turns, lambda i, top: jnp.maximum(top, tile(i, ["peak"])["peak"].max(axis=0)), top
        )
    if "exact" in inputs:
        exact = {name: load_exact(name) for name in ("peak", "weight", "sums")}
        top = jnp.maximum(top, exact["peak"])
    if "sinks" in inputs:
        mask = jnp.broadcast_to((head < heads)[None, :], (rows, columns))
        place = jnp.broadcast_to(head[None, :], (rows, columns))
        sink = triton.load(inputs["sinks"].at[place], mask=mask, other=0.0) * LOG2E
        top = jnp.maximum(top, sink)

    def add(held: dict[str, jax.Array], sums: tuple) -> tuple:
        share = triton.exp2(held["peak"] - top[None])
        found = ((held[name] * share).sum(axis=0) for name in ("weight", "sums"))
        return tuple(x + y for x, y in zip(sums, found, strict=True))

    zeros = jnp.zeros((rows, columns), jnp.float32)
    sums = add(held, (zeros, zeros))
    if turns > 1:
        sums = lax.fori_loop(1, turns, lambda i, sums: add(tile(i, others), sums), sums)
    total, out = sums
    if "sums" in outputs:
        same = jnp.broadcast_to(head[None, :], (rows, columns))  # in all rows
        triton.store(outputs["peak"].at[same], top)
        triton.store(outputs["weight"].at[same], total)
        exists = jnp.broadcast_to(inside[:, None], (rows, columns))
        triton.store(outputs["sums"].at[channel[:, None], head[None, :]], out, mask=exists)
        return
    if "rotation" in inputs:
        out = unrotate(inputs["rotation"], matrices, gain, out, channel, channels)
    if "exact" in inputs:
        share = triton.exp2(exact["peak"] - top)
        total, out = total + exact["weight"] * share, out + exact["sums"] * share
    if "sinks" in inputs:
        total = total + triton.exp2(sink - top)
    empty = total <= 0.0  # not of NaN
    # with exact tokens one is always seen: if nothing has a share, all scores overflowed
    out = out / jnp.where(empty, jnp.nan if "exact" in inputs else 1.0, total)
    exists = inside[:, None] & (head < heads)[None, :]
    place = outputs["out"].at[head[None, :], channel[:, None]]
    triton.store(place, out.astype(outputs["out"].dtype), mask=exists)
    log = jnp.where(empty, -jnp.inf, (top + jnp.log2(jnp.where(empty, 1.0, total))) / LOG2E)
    same = jnp.broadcast_to(head[None, :], (rows, columns))  # in all rows
    triton.store(outputs["lse"].at[same], log, mask=same < heads)


def combine(
    parts: dict[str, Any],
    sinks: jax.Array | None,
    rotation: RotationOperand | None,
    heads: int,
    dtype: DTypeLike,
) -> tuple[jax.Array, jax.Array]:
    """peak, weight [B, K, splits, columns], sums [B, K, splits, H, columns] of the decode kernel,

    `exact` without the axis of splits, optional sink logits [K, G] and rotation of the splits ->
    output [B, K, G, H] in `dtype`, log-sum-exp [B, K, G] in nats.
    """
    batch, kv_heads, splits, channels, columns = parts["sums"].shape

    def new(*shape: int, of: DTypeLike = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, kv_heads, *shape), of)

    inputs = dict(parts)
    if rotation is not None and splits * _all_rows(channels) * min(columns, HEADS) > TILE:
        shapes = {"peak": (columns,), "weight": (columns,), "sums": (channels, columns)}
        alone = {name: parts[name] for name in shapes}
        merged = _run(alone, {name: new(*shape) for name, shape in shapes.items()}, heads)
        inputs |= {name: x[:, :, None] for name, x in merged.items()}
    if sinks is not None:
        inputs["sinks"] = sinks
    if rotation is not None:
        inputs["rotation"] = rotation
    outputs = _run(inputs, {"out": new(heads, channels, of=dtype), "lse": new(heads)}, heads)
    return outputs["out"], outputs["lse"]


def _all_rows(channels: int) -> int:
    """Rows of a program that has all channels: a rotation mixes them."""
    return max(16, power_of_two(channels))


def _run(
    inputs: dict[str, Any], outputs: dict[str, jax.ShapeDtypeStruct], heads: int
) -> dict[str, jax.Array]:
    """Calls the kernel on the grid (slices of channels and of heads, kv heads, sequences)."""
    batch, kv_heads, splits, channels, columns = inputs["sums"].shape
    slices, columns = max(1, columns // HEADS), min(columns, HEADS)
    rotation, rows = inputs.get("rotation"), _all_rows(channels)
    if rotation is None:
        rows = min(rows, max(16, FEW // (power_of_two(splits) * columns)))

    def of_head(x: Any) -> Any:
        return triton.BlockSpec(
            (None, None, *x.shape[2:]), lambda i, h, j: (j, h) + (0,) * (x.ndim - 2)
        )

    parts = {name: x for name, x in inputs.items() if name not in ("sinks", "rotation")}
    in_specs = jax.tree.map(of_head, parts)
    if "sinks" in inputs:
        in_specs["sinks"] = triton.BlockSpec((None, heads), lambda i, h, j: (h, 0))
    if rotation is not None:
        shared = rotation.parts.shape[1] == 1
        matrix = triton.BlockSpec(
            (rotation.parts.shape[0], None, channels, channels),
            lambda i, h, j: (0, 0 if shared else h, 0, 0),
        )
        signs = triton.BlockSpec((channels,), lambda i, h, j: (0,))
        in_specs["rotation"] = jax.tree.map(lambda x: matrix if x.ndim == 4 else signs, rotation)
    gain = 1.0 if rotation is None else rotation.gain
    return triton.call(
        lambda inputs, outputs: combine_kernel(inputs, outputs, heads=heads, rows=rows, gain=gain),
        triton.Launch((slices * -(-channels // rows), kv_heads, batch), warps=4, stages=1),
        in_specs=(in_specs,),
        out_specs=jax.tree.map(of_head, outputs),
        out_shape=outputs,
        name="decode_combine",
    )(inputs)
