"""Merges the splits of a sequence by their log-sum-exp, in one kernel where XLA makes four."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import triton
from pallas_kernels.dequantize import power_of_two
from pallas_kernels.recent import EMPTY, LOG2E
from pallas_kernels.rotation import Rotation
from pallas_kernels.turning import load_parts, unrotate

# Elements of a tile of partial sums that one program holds in registers.
TILE = 8192


def combine_kernel(
    inputs: dict[str, Any],
    outputs: dict[str, Any],
    *,
    gain: float,
    heads: int,
    rows: int,
) -> None:
    """One program of the grid (channel slice, kv head, sequence).

    Split i has sums [splits, channels, columns], weight and peak [splits, columns]: its output is
    2**peak * sums, its softmax denominator 2**peak * weight. The splits are multiplied by the
    transpose of `rotation`, where there is one; `recent`, a part like a split, is not. Everything
    is loaded before the first use, so that there is one wait for memory.
    """
    splits, columns = inputs["peak"].shape
    channels = outputs["out"].shape[-1]
    split, head = jnp.arange(power_of_two(splits)), jnp.arange(columns)
    channel = triton.program_id(0) * rows + jnp.arange(rows)
    inside = channel < channels

    def load(name: str, at: jax.Array, other: float) -> jax.Array:
        valid = jnp.broadcast_to((at < splits)[:, None], (at.shape[0], columns))
        return triton.load(inputs[name].at[at[:, None], head[None, :]], mask=valid, other=other)

    def load_sums(at: jax.Array) -> jax.Array:
        place = inputs["sums"].at[at[:, None, None], channel[None, :, None], head[None, None, :]]
        exists = (at < splits)[:, None, None] & inside[None, :, None]
        return triton.load(
            place, mask=jnp.broadcast_to(exists, (at.shape[0], rows, columns)), other=0.0
        )

    step = min(power_of_two(splits), max(1, TILE // (rows * columns)))
    sums = load_sums(jnp.arange(step))
    matrices = []
    if "rotation" in inputs:
        matrices = load_parts(inputs["rotation"], channel, channel, channels)
    peak, weight = load("peak", split, EMPTY), load("weight", split, 0.0)
    top = peak.max(axis=0)
    if "recent" in inputs:
        recent = {name: triton.load(inputs["recent"][name].at[head]) for name in ("peak", "weight")}
        recent["sums"] = triton.load(
            inputs["recent"]["sums"].at[channel[:, None], head[None, :]],
            mask=jnp.broadcast_to(inside[:, None], (rows, columns)),
            other=0.0,
        )
        top = jnp.maximum(top, recent["peak"])
    if "sinks" in inputs:
        sink = triton.load(inputs["sinks"].at[head], mask=head < heads, other=0.0) * LOG2E
        top = jnp.maximum(top, sink)
    total = (weight * jnp.exp2(peak - top[None, :])).sum(axis=0)
    if "recent" in inputs:
        total = total + recent["weight"] * jnp.exp2(recent["peak"] - top)
    if "sinks" in inputs:
        total = total + jnp.exp2(sink - top)
    empty = total <= 0.0
    inverse = 1.0 / jnp.where(empty, 1.0, total)

    out = jnp.zeros((rows, columns), jnp.float32)
    for start in range(0, splits, step):
        at = start + jnp.arange(step)
        tile = sums if start == 0 else load_sums(at)
        own = peak if step == split.shape[0] else load("peak", at, EMPTY)
        share = jnp.exp2(own - top[None, :]) * inverse[None, :]
        out = out + (tile * share[:, None, :]).sum(axis=0)
    if "rotation" in inputs:
        out = unrotate(inputs["rotation"], matrices, gain, out, channel, channels)
    if "recent" in inputs:
        out = out + recent["sums"] * (jnp.exp2(recent["peak"] - top) * inverse)[None, :]
    exists = inside[:, None] & (head < heads)[None, :]
    place = outputs["out"].at[head[None, :], channel[:, None]]
    triton.store(place, out.astype(outputs["out"].dtype), mask=exists)
    log = jnp.where(empty, -jnp.inf, (top + jnp.log2(jnp.where(empty, 1.0, total))) / LOG2E)
    triton.store(outputs["lse"].at[head], log, mask=head < heads)


def combine(
    parts: dict[str, Any],
    sinks: jax.Array | None,
    rotation: Rotation | None,
    heads: int,
    dtype: DTypeLike,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """peak, weight [B, K, splits, columns], sums [B, K, splits, H, columns] of the decode kernel,

    `recent` without the axis of splits, optional sink logits [K, G] and rotation of the splits ->
    output [B, K, G, H] in `dtype`, log-sum-exp [B, K, G] in nats.
    """
    batch, kv_heads, splits, channels, columns = parts["sums"].shape
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
        grid=(-(-channels // rows), kv_heads, batch),
        in_specs=(in_specs,),
        out_specs={
            "out": triton.BlockSpec((None, None, heads, channels), lambda i, h, j: (j, h, 0, 0)),
            "lse": triton.BlockSpec((None, None, heads), lambda i, h, j: (j, h, 0)),
        },
        out_shape={
            "out": jax.ShapeDtypeStruct((batch, kv_heads, heads, channels), dtype),
            "lse": jax.ShapeDtypeStruct((batch, kv_heads, heads), jnp.float32),
        },
        warps=4,
        stages=1,
        name="decode_combine",
        interpret=interpret,
    )(inputs)
    return outputs["out"], outputs["lse"]
