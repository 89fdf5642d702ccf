"""Merges the splits of a sequence by their log-sum-exp, in one kernel where XLA makes four."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import triton
from pallas_kernels.decode_kernel import EMPTY, LOG2E
from pallas_kernels.dequantize import power_of_two

# Elements of a tile of partial sums that one program holds in registers.
TILE = 8192


def combine_kernel(
    inputs: dict[str, Any], outputs: dict[str, Any], *, splits: int, heads: int, rows: int
) -> None:
    """One program of the grid (channel slice, kv head, sequence).

    Split i has sums [splits, channels, columns], weight and peak [splits, columns]: its output is
    2**peak * sums, its softmax denominator 2**peak * weight.
    """
    columns = inputs["peak"].shape[-1]
    split = jnp.arange(power_of_two(splits))[:, None]
    head = jnp.arange(columns)
    valid = jnp.broadcast_to(split < splits, (split.shape[0], columns))
    peak = triton.load(inputs["peak"].at[split, head[None, :]], mask=valid, other=EMPTY)
    weight = triton.load(inputs["weight"].at[split, head[None, :]], mask=valid, other=0.0)
    top = peak.max(axis=0)
    if "sinks" in inputs:
        sink = triton.load(inputs["sinks"].at[head], mask=head < heads, other=0.0) * LOG2E
        top = jnp.maximum(top, sink)
    share = jnp.exp2(peak - top[None, :])
    total = (weight * share).sum(axis=0)
    if "sinks" in inputs:
        total = total + jnp.exp2(sink - top)
    empty = total <= 0.0
    share = share / jnp.where(empty, 1.0, total)[None, :]

    channels = outputs["out"].shape[-1]
    channel = triton.program_id(0) * rows + jnp.arange(rows)
    place = inputs["sums"].at[split[:, :, None], channel[None, :, None], head[None, None, :]]
    exists = (split < splits)[:, :, None] & (channel < channels)[None, :, None]
    exists = jnp.broadcast_to(exists, (split.shape[0], rows, columns))
    sums = triton.load(place, mask=exists, other=0.0)
    out = (sums * share[:, None, :]).sum(axis=0)
    exists = (channel < channels)[:, None] & (head < heads)[None, :]
    triton.store(outputs["out"].at[head[None, :], channel[:, None]], out, mask=exists)
    log = jnp.where(empty, -jnp.inf, (top + jnp.log2(jnp.where(empty, 1.0, total))) / LOG2E)
    triton.store(outputs["lse"].at[head], log, mask=head < heads)


def combine(
    parts: dict[str, jax.Array], sinks: jax.Array | None, heads: int, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """peak, weight [B, K, splits, columns], sums [B, K, splits, H, columns] of the decode kernel

    and optional sink logits [K, G] -> output [B, K, G, H], log-sum-exp [B, K, G] in nats.
    """
    batch, kv_heads, splits, channels, columns = parts["sums"].shape
    rows = min(power_of_two(channels), max(16, TILE // (power_of_two(splits) * columns)))
    per_split = triton.BlockSpec((None, None, splits, columns), lambda i, h, j: (j, h, 0, 0))
    sums = triton.BlockSpec(
        (None, None, splits, channels, columns), lambda i, h, j: (j, h, 0, 0, 0)
    )
    in_specs = {"peak": per_split, "weight": per_split, "sums": sums}
    if sinks is not None:
        parts = parts | {"sinks": sinks}
        in_specs["sinks"] = triton.BlockSpec((None, heads), lambda i, h, j: (h, 0))
    outputs = triton.call(
        lambda inputs, outputs: combine_kernel(
            inputs, outputs, splits=splits, heads=heads, rows=rows
        ),
        grid=(-(-channels // rows), kv_heads, batch),
        in_specs=(in_specs,),
        out_specs={
            "out": triton.BlockSpec((None, None, heads, channels), lambda i, h, j: (j, h, 0, 0)),
            "lse": triton.BlockSpec((None, None, heads), lambda i, h, j: (j, h, 0)),
        },
        out_shape={
            "out": jax.ShapeDtypeStruct((batch, kv_heads, heads, channels), jnp.float32),
            "lse": jax.ShapeDtypeStruct((batch, kv_heads, heads), jnp.float32),
        },
        warps=4,
        stages=1,
        name="decode_combine",
        interpret=interpret,
    )(parts)
    return outputs["out"], outputs["lse"]
