"""Merges the splits of a sequence by their log-sum-exp, in one kernel where XLA makes four."""

import functools
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

    Everything is loaded before the first use, so that there is one wait for memory, and in the
    layout of the sums, each row of channels with peaks and weights of its own: they are read again
    rather than sent from thread to thread.
    """
    splits, columns = inputs["peak"].shape
    channels = outputs["out"].shape[-1]
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
    tiles = [start + jnp.arange(step) for start in range(0, splits, step)]
    peaks = [load("peak", at, EMPTY) for at in tiles]
    sums = load("sums", tiles[0], 0.0)
    weights = load("weight", tiles[0], 0.0)
    matrices = []
    if "rotation" in inputs:
        matrices = load_parts(inputs["rotation"], channel, channel, channels)
    top = functools.reduce(jnp.maximum, [peak.max(axis=0) for peak in peaks])
    if "exact" in inputs:
        exact = {name: load_exact(name) for name in ("peak", "weight", "sums")}
        top = jnp.maximum(top, exact["peak"])
    if "sinks" in inputs:
        mask = jnp.broadcast_to((head < heads)[None, :], (rows, columns))
        place = jnp.broadcast_to(head[None, :], (rows, columns))
        sink = triton.load(inputs["sinks"].at[place], mask=mask, other=0.0) * LOG2E
        top = jnp.maximum(top, sink)

    out, total = jnp.zeros((rows, columns), jnp.float32), jnp.zeros((rows, columns), jnp.float32)
    for i, at in enumerate(tiles):
        share = triton.exp2(peaks[i] - top[None])
        total = total + ((weights if i == 0 else load("weight", at, 0.0)) * share).sum(axis=0)
        out = out + ((sums if i == 0 else load("sums", at, 0.0)) * share).sum(axis=0)
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
    slices, columns = max(1, columns // HEADS), min(columns, HEADS)
    rows = max(16, power_of_two(channels))  # all of them: a rotation mixes them
    if rotation is None:
        rows = min(rows, max(16, TILE // (power_of_two(splits) * columns)))

    def of_head(x: Any) -> Any:
        return triton.BlockSpec(
            (None, None, *x.shape[2:]), lambda i, h, j: (j, h) + (0,) * (x.ndim - 2)
        )

    inputs, in_specs = dict(parts), jax.tree.map(of_head, dict(parts))
    if sinks is not None:
        inputs["sinks"] = sinks
        in_specs["sinks"] = triton.BlockSpec((None, heads), lambda i, h, j: (h, 0))
    if rotation is not None:
        inputs["rotation"] = rotation
        shared = rotation.parts.shape[1] == 1
        matrix = triton.BlockSpec(
            (rotation.parts.shape[0], None, channels, channels),
            lambda i, h, j: (0, 0 if shared else h, 0, 0),
        )
        signs = triton.BlockSpec((channels,), lambda i, h, j: (0,))
        in_specs["rotation"] = jax.tree.map(lambda x: matrix if x.ndim == 4 else signs, rotation)
    outputs = triton.call(
        lambda inputs, outputs: combine_kernel(
            inputs,
            outputs,
            heads=heads,
            rows=rows,
            gain=1.0 if rotation is None else rotation.gain,
        ),
        triton.Launch((slices * -(-channels // rows), kv_heads, batch), warps=4, stages=1),
        in_specs=(in_specs,),
        out_specs={
            "out": triton.BlockSpec((None, None, heads, channels), lambda i, h, j: (j, h, 0, 0)),
            "lse": triton.BlockSpec((None, None, heads), lambda i, h, j: (j, h, 0)),
        },
        out_shape={
            "out": jax.ShapeDtypeStruct((batch, kv_heads, heads, channels), dtype),
            "lse": jax.ShapeDtypeStruct((batch, kv_heads, heads), jnp.float32),
        },
        name="decode_combine",
    )(inputs)
    return outputs["out"], outputs["lse"]
