"""Merges the splits of a sequence by their log-sum-exp, in one kernel where XLA makes four."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import triton
from pallas_kernels.dequantize import power_of_two
from pallas_kernels.recent import EMPTY, LOG2E
from pallas_kernels.rotation import Rotation, unrotate

# Elements of a tile of partial sums that one program holds in registers.
TILE = 8192


def combine_kernel(
    inputs: dict[str, Any],
    outputs: dict[str, Any],
    *,
    rotated: int,
    gain: float,
    heads: int,
    rows: int,
) -> None:
    """One program of the grid (channel slice, kv head, sequence).

    Split i has sums [splits, channels, columns], weight and peak [splits, columns]: its output is
    2**peak * sums, its softmax denominator 2**peak * weight. The first `rotated` splits are
    multiplied by the transpose of `rotation`, where there is one.
    """
    splits, columns = inputs["peak"].shape
    split, head = jnp.arange(power_of_two(splits)), jnp.arange(columns)

    def load(name: str, at: jax.Array, other: float) -> jax.Array:
        valid = jnp.broadcast_to((at < splits)[:, None], (at.shape[0], columns))
        return triton.load(inputs[name].at[at[:, None], head[None, :]], mask=valid, other=other)

    peak = load("peak", split, EMPTY)
    top = peak.max(axis=0)
    if "sinks" in inputs:
        sink = triton.load(inputs["sinks"].at[head], mask=head < heads, other=0.0) * LOG2E
        top = jnp.maximum(top, sink)
    total = (load("weight", split, 0.0) * jnp.exp2(peak - top[None, :])).sum(axis=0)
    if "sinks" in inputs:
        total = total + jnp.exp2(sink - top)
    empty = total <= 0.0
    inverse = 1.0 / jnp.where(empty, 1.0, total)

    channels = outputs["out"].shape[-1]
    channel = triton.program_id(0) * rows + jnp.arange(rows)

    def weighted(first: int, count: int, channel: jax.Array) -> jax.Array:
        """float32 [len(channel), columns], the sum of some splits."""
        rows = channel.shape[0]
        result = jnp.zeros((rows, columns), jnp.float32)
        step = min(power_of_two(count), max(1, TILE // (rows * columns)))
        for start in range(first, first + count, step):
            at = start + jnp.arange(step)
            share = jnp.exp2(load("peak", at, EMPTY) - top[None, :]) * inverse[None, :]
            place = inputs["sums"].at[
                at[:, None, None], channel[None, :, None], head[None, None, :]
            ]
            exists = (at < first + count)[:, None, None] & (channel < channels)[None, :, None]
            exists = jnp.broadcast_to(exists, (step, rows, columns))
            sums = triton.load(place, mask=exists, other=0.0)
            result = result + (sums * share[:, None, :]).sum(axis=0)
        return result

    if "rotation" in inputs:
        out = unrotate(inputs["rotation"], gain, weighted(0, rotated, channel), channels)
        if rotated < splits:
            out = out + weighted(rotated, splits - rotated, channel)
    else:
        out = weighted(0, splits, channel)
    exists = (channel < channels)[:, None] & (head < heads)[None, :]
    place = outputs["out"].at[head[None, :], channel[:, None]]
    triton.store(place, out.astype(outputs["out"].dtype), mask=exists)
    log = jnp.where(empty, -jnp.inf, (top + jnp.log2(jnp.where(empty, 1.0, total))) / LOG2E)
    triton.store(outputs["lse"].at[head], log, mask=head < heads)


def combine(
    parts: dict[str, jax.Array],
    sinks: jax.Array | None,
    rotation: Rotation | None,
    recent: bool,
    heads: int,
    dtype: DTypeLike,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """peak, weight [B, K, splits, columns], sums [B, K, splits, H, columns] of the decode kernel,

    optional sink logits [K, G] and rotation of all splits, but of the last one if
    that is `recent` -> output [B, K, G, H] in `dtype`, log-sum-exp [B, K, G] in nats.
    """
    batch, kv_heads, splits, channels, columns = parts["sums"].shape
    rows = max(16, power_of_two(channels))
    if rotation is None:
        rows = min(rows, max(16, TILE // (power_of_two(splits) * columns)))
    per_split = triton.BlockSpec((None, None, splits, columns), lambda i, h, j: (j, h, 0, 0))
    sums = triton.BlockSpec(
        (None, None, splits, channels, columns), lambda i, h, j: (j, h, 0, 0, 0)
    )
    inputs: dict[str, Any] = dict(parts)
    in_specs: dict[str, Any] = {"peak": per_split, "weight": per_split, "sums": sums}
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
            rotated=splits - recent,
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
