"""Tokens in full precision beside the blocks: one more program for each sequence and kv head.

It runs in the grid of the decode kernel, so that the few full-precision tokens cost no launch and
are read while the other programs read the blocks, and it leaves what a split leaves: peak, weight
and sums, to be merged by `combine`.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import triton
from pallas_kernels.dequantize import power_of_two
from pallas_kernels.rotation import merge, split

LOG2E = math.log2(math.e)
# Stands for a score of -inf: exp2 of any difference to it is 0, never NaN.
EMPTY = -1e30
# Tokens of a tile: its keys and values together fill half of the registers of a warp.
TILE = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recent:
    """What a query sees in full precision: segments of tokens, not rotated; the last is the newest.

    query [B, N, H]: the queries as they were before their rotation. keys, values: an array
    [rows, slots, K, H] per segment. spans [B, segments, 4]: (row, first, count, slot) says that
    sequence b has that row of the segment, and sees `count` of its slots as a ring, from slot
    `first` on; what lies in the others may be anything. With `write`, the newest token, of a last
    segment of one slot, is written into that `slot` of the others once it was attended to, or
    nowhere if there is no such slot. key_mean [rows, K, H]: was taken off the keys of the blocks,
    in the rows of the first segment; its product with the query is added to their scores.
    """

    query: Float[Array, "B N H"]
    keys: tuple[Float[Array, "rows slots K H"], ...]
    values: tuple[Float[Array, "rows slots K H"], ...]
    spans: Int[Array, "B segments 4"]
    key_mean: Float[Array, "rows K H"] | None = None
    write: bool = dataclasses.field(default=False, metadata=dict(static=True))


def check_recent(recent: Recent, batch: int, heads: int, kv_heads: int) -> None:
    """Raises where the shapes of the segments do not fit each other."""
    channels, segments = recent.query.shape[-1], len(recent.keys)
    if recent.query.shape != (batch, heads, channels):
        raise ValueError(
            f"got unrotated queries {recent.query.shape}, expected {(batch, heads, channels)}"
        )
    for k, v in zip(recent.keys, recent.values, strict=True):
        if k.shape != v.shape or k.dtype != v.dtype or k.shape[2:] != (kv_heads, channels):
            raise ValueError(
                f"got a segment of keys {k.dtype}{list(k.shape)} and values "
                f"{v.dtype}{list(v.shape)}, expected both [rows, slots, {kv_heads}, {channels}]"
            )
    if recent.spans.shape != (batch, segments, 4):
        raise ValueError(f"got spans {recent.spans.shape}, expected {(batch, segments, 4)}")
    if recent.write and recent.keys[-1].shape[1] != 1:
        raise ValueError(
            f"got a last segment of {recent.keys[-1].shape[1]} tokens to write, expected 1"
        )


def capped(logits: jax.Array, soft_cap: float | None, interpret: bool) -> jax.Array:
    """Scores in nats -> soft-capped, in base 2; scores in base 2 as they are without a cap."""
    if soft_cap is None:
        return logits
    # tanh(x) = 1 - 2 / (1 + exp(2 x)), which is right at both infinities
    grown = triton.exp2(logits * (2.0 * LOG2E / soft_cap), interpret)
    return soft_cap * LOG2E * (1.0 - 2.0 / (1.0 + grown))


def mean_score(refs: Any, columns: int, heads: int, scale: float) -> jax.Array:
    """float32 [columns]: the query's product with the mean key, scaled."""
    query, channel = _query(refs, jnp.arange(columns), heads)
    row = refs.spans[0, 0]
    mean = triton.load(refs.key_mean.at[row, channel], mask=channel < _dim(refs), other=0.0)
    return (query * mean.astype(jnp.float32)[None, :]).sum(axis=1) * scale


def attend_recent(
    refs: Any, columns: int, heads: int, scale: float, soft_cap: float | None, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(peak, weight [columns], sums [channels, columns]) over all segments, scores in base 2."""
    dtype = refs.keys[0].dtype
    # A 16-bit operand is exact in two parts, which lie in neighbouring columns.
    parts = 1 if dtype == jnp.float32 else 2
    column = jnp.arange(columns * parts)
    query, channel = _query(refs, lax.div(column, jnp.full_like(column, parts)), heads)
    rounded = query.astype(dtype)
    rest = (query - rounded.astype(jnp.float32)).astype(dtype)
    odd = lax.rem(column, jnp.full_like(column, parts)) == 1
    query = jnp.where(jnp.broadcast_to(odd[:, None], query.shape), rest, rounded)
    exists = (channel < _dim(refs))[None, :]

    def tile(segment: int, slot: jax.Array, carry: tuple) -> tuple:
        peak, weight, sums = carry
        keys, values = refs.keys[segment], refs.values[segment]
        slots = keys.shape[1]
        row, first, count = (refs.spans[segment, i] for i in range(3))
        age = jnp.where(slot >= first, slot - first, slot - first + slots)
        seen = (slot < slots) & (age < count)
        place = (row, slot[:, None], channel[None, :])
        mask = seen[:, None] & exists
        k = triton.load(keys.at[place], mask=mask, other=0.0)
        v = triton.load(values.at[place], mask=mask, other=0.0)
        scores = merge(triton.float_dot(k, query, 1, 1), parts) * scale
        scores = capped(scores, soft_cap, interpret)
        scores = jnp.where(seen[:, None], scores, EMPTY)
        new_peak = jnp.maximum(peak, scores.max(axis=0))
        share = jnp.where(seen[:, None], triton.exp2(scores - new_peak[None, :], interpret), 0.0)
        old = triton.exp2(peak - new_peak, interpret)
        product = merge(triton.float_dot(v, split(share, dtype, parts), 0, 0), parts)
        return new_peak, weight * old + share.sum(axis=0), sums * old[None, :] + product

    carry = (
        jnp.full((columns,), EMPTY, jnp.float32),
        jnp.zeros((columns,), jnp.float32),
        jnp.zeros((channel.shape[0], columns), jnp.float32),
    )
    for segment, keys in enumerate(refs.keys):
        size = min(TILE, max(16, power_of_two(keys.shape[1])))
        carry = loop(
            -(-keys.shape[1] // size),
            lambda i, carry, s=segment, n=size: tile(s, i * n + jnp.arange(n), carry),
            carry,
        )
    return carry


def write_newest(refs: Any, keys: tuple, values: tuple) -> None:
    """Copies the newest token into the segments `keys`, `values` that it is to be kept in."""
    channel = jnp.arange(power_of_two(_dim(refs)))
    exists = channel < _dim(refs)
    for new, stored in ((refs.keys[-1], keys), (refs.values[-1], values)):
        row = refs.spans[len(stored), 0]
        token = triton.load(new.at[row, 0, channel], mask=exists, other=0.0)
        for segment, target in enumerate(stored):
            slot = refs.spans[segment, 3]
            inside = (slot >= 0) & (slot < target.shape[1])
            place = target.at[refs.spans[segment, 0], slot, channel]
            triton.store(place, token, mask=exists & inside)


def loop(count: int, body: Any, carry: tuple) -> tuple:
    """fori_loop downwards: Triton would pipeline a counted loop, in shared memory that the loop

    over the blocks needs.
    """
    if count <= 1:
        return body(jnp.int32(0), carry) if count else carry

    def step(state: tuple) -> tuple:
        left, carry = state
        return left - 1, body(left - 1, carry)

    return lax.while_loop(lambda state: state[0] > 0, step, (jnp.int32(count), carry))[1]


def _dim(refs: Any) -> int:
    return refs.query.shape[-1]


def _query(refs: Any, head: jax.Array, heads: int) -> tuple[jax.Array, jax.Array]:
    """float32 [len(head), channels], 0 where there is no such head or channel; the channels."""
    channel = jnp.arange(max(16, power_of_two(_dim(refs))))
    mask = (head < heads)[:, None] & (channel < _dim(refs))[None, :]
    rows = triton.load(refs.query.at[head[:, None], channel[None, :]], mask=mask, other=0.0)
    return rows.astype(jnp.float32), channel
