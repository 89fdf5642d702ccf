"""Merges the splits of a sequence by their log-sum-exp, in one kernel where XLA makes four.

In two, where a rotation wants all channels of more splits than the registers of a program hold.
"""

from collections.abc import Callable, Iterable
from typing import Any, cast

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
# What a split without tokens has.
OTHERS = {"peak": EMPTY, "sums": 0.0, "weight": 0.0}


def combine_kernel(
    inputs: dict[str, Any],
    outputs: dict[str, Any],
    *,
    gain: float,
    splits: int,
    heads: int,
    rows: int,
) -> None:
    """One program of the grid (slice of channels and of heads, kv head, sequence).

    Slot i has sums [slots, channels, columns], weight and peak [slots, columns] of a split: its
    output is 2**peak * sums, its softmax denominator 2**peak * weight. A sequence has `splits` of
    them, or as many as `dealt` says, from the slot on that it says. The splits are multiplied by
    the transpose of `rotation`, where there is one; `exact`, a part like a split, is not.

    Outputs are `out` and `lse`, or those of a part. Of splits that are one tile everything is
    loaded before the first use, so that there is one wait for memory, and in the layout of the
    sums, each row of channels with peaks and weights of its own: they are read again rather than
    sent from thread to thread.
    """
    _, channels, columns = inputs["sums"].shape
    slices, part = columns // HEADS, triton.program_id(0)
    if slices > 1:
        columns, head = HEADS, lax.rem(part, slices) * HEADS + jnp.arange(HEADS)
        part = lax.div(part, slices)
    else:
        head = jnp.arange(columns)
    channel = part * rows + jnp.arange(rows)
    inside = channel < channels

    own, usual = triton.program_id(2) * splits, cast(Any, None)
    if "dealt" in inputs:
        own += triton.program_id(2)
        first, count = inputs["dealt"][0], inputs["dealt"][1]
        usual = (first == own) & (count == splits)

    def load(name: str, first: Any, at: jax.Array, most: int) -> jax.Array:
        """[len(at), rows, columns] of the slots `at` behind the first, which are `most`."""
        row = (channel,) if name == "sums" else ()
        slot = first + at
        place = (slot[:, None, None], *(x[None, :, None] for x in row), head[None, None, :])
        exists = jnp.broadcast_to((at < most)[:, None, None], (at.shape[0], rows, columns))
        exists = exists & inside[None, :, None] if row else exists
        place = tuple(jnp.broadcast_to(x, exists.shape) for x in place)
        return triton.load(inputs[name].at[place], mask=exists, other=OTHERS[name])

    def load_exact(name: str) -> jax.Array:
        row = (channel[:, None],) if name == "sums" else ()
        place = tuple(jnp.broadcast_to(x, (rows, columns)) for x in (*row, head[None, :]))
        exists = jnp.broadcast_to(inside[:, None], (rows, columns))
        return triton.load(inputs["exact"][name].at[place], mask=exists, other=0.0)

    step = min(power_of_two(splits), max(1, TILE // (rows * columns)))
    turns = -(-splits // step)

    def tile(i: Any, names: Iterable[str]) -> dict[str, jax.Array]:
        at = i * step + jnp.arange(step)
        held = {name: load(name, own, at, splits) for name in names}
        if usual is not None:  # loaded beside the number, and not after it
            held = {name: jnp.where(usual, x, OTHERS[name]) for name, x in held.items()}
        return held

    held = tile(0, OTHERS)
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
        sums = lax.fori_loop(1, turns, lambda i, sums: add(tile(i, OTHERS), sums), sums)
    total, out = sums
    if "dealt" in inputs:
        others = first, jnp.where(usual, 0, count)
        top, total, out = _dealt(load, others, (top, total, out))
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


def _dealt(load: Callable, place: tuple, carry: tuple) -> tuple:
    """Peak, weight and sums with the splits in `place`: (the first slot, how many)."""
    (first, count), (rows, columns) = place, carry[0].shape
    step = max(1, FEW // (rows * columns))

    def add(i: jax.Array, carry: tuple) -> tuple:
        top, *sums = carry
        at = i * step + jnp.arange(step)
        held = {name: load(name, first, at, count) for name in OTHERS}
        peak = jnp.maximum(top, held["peak"].max(axis=0))
        old, share = triton.exp2(top - peak), triton.exp2(held["peak"] - peak[None])
        new = ((held[name] * share).sum(axis=0) for name in ("weight", "sums"))
        return peak, *(x * old + y for x, y in zip(sums, new, strict=True))

    return lax.fori_loop(0, lax.div(count + step - 1, step), add, carry)


def combine(
    parts: dict[str, Any],
    splits: int,
    sinks: jax.Array | None,
    rotation: RotationOperand | None,
    heads: int,
    dtype: DTypeLike,
) -> tuple[jax.Array, jax.Array]:
    """peak, weight [K, slots, columns], sums [K, slots, H, columns] of the decode kernel,

    where slots are `splits` of each sequence, one after the other; or, with one more slot between
    sequences, as many of each as `dealt` [K, B, 2] says, behind the first that it says; `exact`
    [B, K, ...] without slots; optional sink logits [K, G] and rotation of the splits ->
    output [B, K, G, H] in `dtype`, log-sum-exp [B, K, G] in nats.
    """
    kv_heads, slots, channels, columns = parts["sums"].shape
    batch = parts["dealt"].shape[1] if "dealt" in parts else slots // splits

    def new(*shape: int, of: DTypeLike = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, kv_heads, *shape), of)

    inputs = dict(parts)
    if rotation is not None and splits * _all_rows(channels) * min(columns, HEADS) > TILE:
        alone = {name: x for name, x in parts.items() if name != "exact"}
        merged = {
            name: jax.ShapeDtypeStruct((kv_heads, batch, *parts[name].shape[2:]), jnp.float32)
            for name in OTHERS
        }
        inputs |= _run(alone, merged, splits, heads, batch)
        inputs.pop("dealt", None)
        splits = 1
    if sinks is not None:
        inputs["sinks"] = sinks
    if rotation is not None:
        inputs["rotation"] = rotation
    found = {"out": new(heads, channels, of=dtype), "lse": new(heads)}
    outputs = _run(inputs, found, splits, heads, batch)
    return outputs["out"], outputs["lse"]


def _all_rows(channels: int) -> int:
    """Rows of a program that has all channels: a rotation mixes them."""
    return max(16, power_of_two(channels))


def _run(
    inputs: dict[str, Any],
    outputs: dict[str, jax.ShapeDtypeStruct],
    splits: int,
    heads: int,
    batch: int,
) -> dict[str, jax.Array]:
    """Calls the kernel on the grid (slices of channels and of heads, kv heads, sequences)."""
    kv_heads, _, channels, columns = inputs["sums"].shape
    slices, columns = max(1, columns // HEADS), min(columns, HEADS)
    rotation, rows = inputs.get("rotation"), _all_rows(channels)
    if rotation is None:
        rows = min(rows, max(16, FEW // (power_of_two(splits) * columns)))

    def of_slots(x: Any) -> Any:  # [K, ...]
        return triton.BlockSpec((None, *x.shape[1:]), lambda i, h, j: (h,) + (0,) * (x.ndim - 1))

    def of_head(x: Any) -> Any:  # [B, K, ...]
        return triton.BlockSpec(
            (None, None, *x.shape[2:]), lambda i, h, j: (j, h) + (0,) * (x.ndim - 2)
        )

    def of_sequence(x: Any) -> Any:  # [K, B, ...]
        return triton.BlockSpec(
            (None, None, *x.shape[2:]), lambda i, h, j: (h, j) + (0,) * (x.ndim - 2)
        )

    in_specs: dict[str, Any] = {name: of_slots(inputs[name]) for name in OTHERS}
    if "exact" in inputs:
        in_specs["exact"] = jax.tree.map(of_head, inputs["exact"])
    if "dealt" in inputs:
        in_specs["dealt"] = of_sequence(inputs["dealt"])
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
        lambda inputs, outputs: combine_kernel(
            inputs, outputs, gain=gain, splits=splits, heads=heads, rows=rows
        ),
        triton.Launch((slices * -(-channels // rows), kv_heads, batch), warps=4, stages=1),
        in_specs=(in_specs,),
        out_specs=jax.tree.map(of_sequence if "sums" in outputs else of_head, outputs),
        out_shape=outputs,
        name="decode_combine",
    )(inputs)
