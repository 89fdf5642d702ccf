"""Tokens in full precision beside the blocks: the first work of one program of the decode kernel.

So the few full-precision tokens cost no launch and are read while the other programs read blocks.
They leave what a split leaves: peak, weight and sums, to be merged by `combine`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_attention.phases import PhasesOperand, check_phases
from pallas_kernels.primitives import triton
from pallas_kernels.primitives.dequantize import divide, power_of_two
from pallas_kernels.primitives.limits import MAX_QUERIES
from pallas_kernels.primitives.rotation import merge, split

LOG2E = math.log2(math.e)
# Stands for a score of -inf: exp2 of any difference to it is 0, never NaN.
EMPTY = -1e30
# Tokens of a tile: the shortest product, and no more bytes than a tile of blocks has, whose shared
# memory it uses.
TILE = 16


class ExactPlaces(NamedTuple):
    """Where the tokens of one sequence lie, in int32 scalars.

    blocks: (first, end) of the compressed tokens that are seen. segments: (first, count, slot) of
    each segment: `count` of its slots are seen, as a ring, from slot `first` on; the newest token
    is to be written into `slot`, if there is such a slot.
    """

    blocks: tuple[Any, Any]
    segments: tuple[tuple[Any, Any, Any], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExactOperand:
    """What a query sees in full precision: segments of tokens, not rotated; the last is the newest.

    query [B, N, H], or [B, K, G, H]: before their rotation. keys, values: an array [layers
    * B, slots, K, H] per segment, of which this is the `layer`, or [B, slots, K, H] without one; of
    the newest [B, T, K, H]; what lies in slots that are not seen may be anything. The heads of a kv
    head are those of `queries` tokens one after the other, the last tokens of the T but `later`;
    each sees of the T those up to itself. key_mean [layers
    * B, K, H]: was taken off the keys of the blocks, turned by the `phases` of each token if there
    are any; its product with the query is added to their scores. `places` says where the tokens of
    a sequence lie, from its length and its number of `pending` tokens; it runs inside the kernel,
    since a kernel of its own would take longer than the arithmetic. With `write` the newest token
    is written where it says, once it was attended to.
    """

    query: Float[Array, "B *heads H"]
    keys: tuple[Float[Array, "_ _ K H"], ...]
    values: tuple[Float[Array, "_ _ K H"], ...]
    pending: Int[Array, " B"]
    places: Callable[[Any, Any], ExactPlaces] = dataclasses.field(metadata=dict(static=True))
    key_mean: Float[Array, "rows K H"] | None = None
    phases: PhasesOperand | None = None
    write: bool = dataclasses.field(default=False, metadata=dict(static=True))
    layer: Int[Array, ""] | None = None
    queries: int = dataclasses.field(default=1, metadata=dict(static=True))
    later: int = dataclasses.field(default=0, metadata=dict(static=True))


def check_exact(exact: ExactOperand, batch: int, heads: int, kv_heads: int) -> None:
    """Raises where the shapes of the segments do not fit each other."""
    channels = exact.query.shape[-1]
    if exact.query.shape != (batch, heads, channels):
        raise ValueError(
            f"unrotated queries: got {exact.query.shape}, expected {(batch, heads, channels)}"
        )
    layers = 1 if exact.layer is None else exact.keys[0].shape[0] // batch
    rows = [layers * batch] * (len(exact.keys) - 1) + [batch]
    for k, v, count in zip(exact.keys, exact.values, rows, strict=True):
        expected = (count, k.shape[1], kv_heads, channels)
        if k.shape != expected or v.shape != expected or k.dtype != v.dtype:
            raise ValueError(
                f"segment: got keys {k.dtype}{list(k.shape)} and values "
                f"{v.dtype}{list(v.shape)}, expected both [{count}, slots, {kv_heads}, {channels}]"
            )
    if exact.phases is not None:
        check_phases(exact.phases, channels)
    newest = exact.keys[-1].shape[1]
    if not exact.queries + exact.later <= newest <= (1 if exact.write else MAX_QUERIES):
        raise ValueError(
            f"newest tokens: got {newest}, expected at least the {exact.queries + exact.later} of "
            f"the queries and later ones, at most {MAX_QUERIES}, and 1 that is written"
        )
    if heads // kv_heads % exact.queries:
        raise ValueError(
            f"query heads: got {heads // kv_heads} a kv head, expected as many of each of "
            f"{exact.queries} tokens"
        )


def capped(logits: jax.Array, soft_cap: float | None) -> jax.Array:
    """Scores in nats -> soft-capped, in base 2; scores in base 2 as they are without a cap."""
    if soft_cap is None:
        return logits
    # tanh(x) = 1 - 2 / (1 + exp(2 x)), which is right at both infinities
    grown = triton.exp2(logits * (2.0 * LOG2E / soft_cap))
    return soft_cap * LOG2E * (1.0 - 2.0 / (1.0 + grown))


def mean_score(refs: Any, row: jax.Array, columns: int, heads: int, scale: float) -> jax.Array:
    """float32 [columns]: the query's product with the mean key of this row, scaled."""
    query, channel = _query(refs.query, jnp.arange(columns), heads)
    mean = triton.load(refs.key_mean.at[row, channel], mask=channel < _dim(refs), other=0.0)
    return nan_unless_finite((query * mean.astype(jnp.float32)[None, :]).sum(axis=1) * scale)


def attend_exact(
    refs: Any,
    places: ExactPlaces,
    rows: list[jax.Array],
    columns: int,
    heads: int,
    scale: float,
    soft_cap: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(peak, weight [columns], sums [channels, columns]) over all segments, scores in base 2.

    `rows`: of the sequence in each segment.
    """
    dtype = refs.keys[0].dtype
    # A 16-bit operand is exact in two parts, which lie in neighbouring columns.
    parts = 1 if dtype == jnp.float32 else 2
    query, channel = query_parts(refs.query, columns, heads, dtype, parts)
    exists = (channel < _dim(refs))[None, :]

    def load(segment: int, slot: jax.Array) -> tuple:
        keys, values = refs.keys[segment], refs.values[segment]
        slots = keys.shape[1]
        first, count, _ = places.segments[segment]
        age = jnp.where(slot >= first, slot - first, slot - first + slots)
        seen = (slot < slots) & (age < count)
        place = (rows[segment], slot[:, None], channel[None, :])
        mask = seen[:, None] & exists
        k = triton.load(keys.at[place], mask=mask, other=0.0)
        v = triton.load(values.at[place], mask=mask, other=0.0)
        return seen, k, v

    def attend(tile: tuple, carry: tuple, causal: jax.Array | None = None) -> tuple:
        seen, k, v = tile
        peak, weight, sums = carry

        def visible() -> jax.Array:
            return seen[:, None] if causal is None else causal

        scores = merge(triton.float_dot(k, query, 1, 1), parts) * scale
        scores = capped(nan_unless_finite(scores), soft_cap)
        scores = jnp.where(visible(), scores, EMPTY)
        new_peak = jnp.maximum(peak, scores.max(axis=0))
        share = jnp.where(visible(), triton.exp2(scores - new_peak[None, :]), 0.0)
        old = triton.exp2(peak - new_peak)
        spoilt = None
        if causal is not None:  # 0 * NaN is NaN: of what some queries do not see
            finite = jnp.abs(v.astype(jnp.float32)) < jnp.inf
            counted = split(causal.astype(jnp.float32), dtype, parts)
            lost = jnp.where(finite, 0.0, 1.0).astype(dtype)
            spoilt = merge(triton.float_dot(lost, counted, 0, 0), parts)
            v = jnp.where(finite, v, jnp.zeros_like(v))
        product = merge(triton.float_dot(v, split(share, dtype, parts), 0, 0), parts)
        weight = weight * old + share.sum(axis=0)
        sums = sums * old[None, :] + product
        if spoilt is not None:
            sums = jnp.where(spoilt > 0, jnp.nan, sums)
        return new_peak, weight, sums

    carry = (
        jnp.full((columns,), EMPTY, jnp.float32),
        jnp.zeros((columns,), jnp.float32),
        jnp.zeros((channel.shape[0], columns), jnp.float32),
    )
    # While the blocks saturate the memory a load takes as long as two tiles of them: few waits.
    slots = [keys.shape[1] for keys in refs.keys]
    short = [load(i, jnp.arange(TILE)) for i, n in enumerate(slots) if n <= TILE]
    for tile in short[:-1]:
        carry = attend(tile, carry)
    carry = attend(short[-1], carry, _causal(refs, columns, heads))
    for segment, n in enumerate(slots):
        if n > TILE:
            carry = lax.fori_loop(
                0,
                -(-n // TILE),
                lambda i, carry, s=segment: attend(load(s, i * TILE + jnp.arange(TILE)), carry),
                carry,
            )
    peak, weight, sums = carry
    return peak, weight, nan_unless_finite(sums)


def _causal(refs: Any, columns: int, heads: int) -> jax.Array | None:
    """bool [TILE, columns]: which of the newest tokens each head sees; None for the only one."""
    count = refs.keys[-1].shape[1]
    if count == 1:
        return None
    query = divide(jnp.arange(columns), heads // refs.queries)[0]
    last = jnp.minimum(query + (count - refs.queries - refs.later), count - 1)  # of padding too
    return jnp.arange(TILE)[:, None] <= last[None, :]


def write_newest(
    refs: Any, places: ExactPlaces, rows: list[jax.Array], keys: tuple, values: tuple
) -> None:
    """Copies the newest token into the segments `keys`, `values` that it is to be kept in."""
    channel = jnp.arange(power_of_two(_dim(refs)))
    exists = channel < _dim(refs)
    for new, stored in ((refs.keys[-1], keys), (refs.values[-1], values)):
        token = triton.load(new.at[rows[-1], 0, channel], mask=exists, other=0.0)
        for segment, target in enumerate(stored):
            slot = places.segments[segment][2]
            inside = (slot >= 0) & (slot < target.shape[1])
            place = target.at[rows[segment], slot, channel]
            triton.store(place, token, mask=exists & inside)


def query_parts(
    ref: Any, columns: int, heads: int, dtype: Any, parts: int
) -> tuple[jax.Array, jax.Array]:
    """[columns * parts, channels] of a dtype, the parts of a query side by side; the channels."""
    column = jnp.arange(columns * parts)
    query, channel = _query(ref, lax.div(column, jnp.full_like(column, parts)), heads)
    rounded = query.astype(dtype)
    rest = (query - rounded.astype(jnp.float32)).astype(dtype)
    odd = lax.rem(column, jnp.full_like(column, parts)) == 1
    return jnp.where(jnp.broadcast_to(odd[:, None], query.shape), rest, rounded), channel


def nan_unless_finite(x: jax.Array) -> jax.Array:
    """NaN in the place of infinities."""
    return jnp.where(jnp.abs(x) < jnp.inf, x, jnp.nan)


def _dim(refs: Any) -> int:
    return refs.query.shape[-1]


def _query(ref: Any, head: jax.Array, heads: int) -> tuple[jax.Array, jax.Array]:
    """float32 [len(head), channels], 0 where there is no such head or channel; the channels."""
    channel = jnp.arange(max(16, power_of_two(ref.shape[-1])))
    mask = (head < heads)[:, None] & (channel < ref.shape[-1])[None, :]
    rows = triton.load(ref.at[head[:, None], channel[None, :]], mask=mask, other=0.0)
    return rows.astype(jnp.float32), channel
