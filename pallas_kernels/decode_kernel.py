"""The decode kernel: one program attends with one kv head's query group to one split of one sequence.

Tokens lie on the rows of the scores (S^T = K q^T) and channels on the rows of the output
(O^T = V^T P^T), so that codes are the left operand of both products: they go from shared memory to
registers, become int8 levels there and feed the tensor cores. The right operands, q and P, are 15-bit
integers in two base-128 digits; a head owns two neighbouring columns, high digit and low digit, so that
up to four heads fill the narrowest product without a loss. All sums over integers are exact.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import triton
from pallas_kernels.dequantize import divide, power_of_two
from pallas_kernels.gather import Decoder

LOG2E = math.log2(math.e)
# Stands for a score of -inf: exp2 of any difference to it is 0, never NaN.
EMPTY = -1e30
# Two digits in base 128, the high one at most 127.
UNITS = 127 * 128
# 1.5 * 2**23: adding it leaves an integer in the low bits of a float32.
MAGIC, MAGIC_BITS = 12582912.0, 0x4B400000
# Values this small a share of the largest scale are as good as 0; bounds exp2(score - peak).
MIN_EXPONENT = -40.0

Refs = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the compiler must know. A key part is (decoder, query input, first channel, multiplier)."""

    tokens: int
    pages: int
    heads: int
    key_parts: tuple[tuple[Decoder, int, int, float], ...]
    value_decoders: tuple[Decoder, ...]
    value_channels: tuple[int, ...]
    soft_cap: float | None
    splits: int
    warps: int
    stages: int
    interpret: bool

    @property
    def columns(self) -> int:
        """Query heads of a group, padded: twice as many columns fill a product of 8."""
        return max(4, power_of_two(self.heads))


def digits(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """|x| <= UNITS -> integers (high, low) with high * 128 + low = round(x)."""
    shifted = lax.bitcast_convert_type(x + (MAGIC + 64.0), jnp.int32) - MAGIC_BITS
    return shifted >> 7, (shifted & 127) - 64


def merge_digits(product: jax.Array) -> jax.Array:
    """int32 [rows, 2 * heads] -> high * 128 + low, [rows, heads]."""
    rows, columns = product.shape
    high, low = jnp.unstack(product.reshape(rows, columns // 2, 2), axis=-1)
    return high * 128 + low


def interleave_digits(x: jax.Array) -> jax.Array:
    """float [rows, heads] -> int8 digits [rows, 2 * heads]."""
    high, low = digits(x)
    rows, columns = x.shape
    both = jnp.stack([high, low], axis=-1).reshape(rows, 2 * columns)
    return both.astype(jnp.int8)


def _query_rows(plan: Plan, ref: Any, decoder: Decoder, piece: int, first: int, head: jax.Array):
    """float32 [len(head), columns] of the channels that a piece's columns stand for, 0 where none."""
    _, channel, exists = decoder.elements(piece, jnp.arange(decoder.columns))
    mask = (head < plan.heads)[:, None] & exists[None, :]
    rows = ref.at[head[:, None], (first + channel)[None, :]]
    return triton.load(rows, mask=mask, other=0.0).astype(jnp.float32)


def prepare_query(plan: Plan, ref: Any, decoder: Decoder, first: int, multiplier: float) -> tuple:
    """(int8 [2 * heads, columns] of each piece, centre int32 [2 * heads], unit float32 [heads])."""
    row = jnp.arange(2 * plan.columns)
    head = jnp.arange(plan.columns)

    def unit(head):
        pieces = range(decoder.pieces)
        rows = [_query_rows(plan, ref, decoder, p, first, head) for p in pieces]
        peak = rows[0] * 0.0
        for x in rows:
            peak = jnp.maximum(peak, jnp.abs(x))
        return jnp.maximum(peak.max(axis=1), 1e-30) / UNITS

    column_unit = unit(divide(row, 2)[0])
    pieces, total = [], jnp.zeros((2 * plan.columns,), jnp.int32)
    for piece in range(decoder.pieces):
        x = _query_rows(plan, ref, decoder, piece, first, divide(row, 2)[0])
        high, low = digits(x / column_unit[:, None])
        digit = jnp.where((row & 1 == 0)[:, None], high, low)
        total = total + digit.sum(axis=1)
        pieces.append(digit.astype(jnp.int8))
    return pieces, total * -decoder.centre, unit(head) * multiplier


def key_scale(word: jax.Array) -> jax.Array:
    """The key's scale: the low half of the token's word, or a scale of its own (the sketch)."""
    if word.dtype == jnp.uint32:
        return lax.bitcast_convert_type(word << 16, jnp.float32)
    return word.astype(jnp.float32)


def value_scale(word: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The value's scale, the high half of the word, and the logarithm of a power of two above it."""
    scale = lax.bitcast_convert_type((word >> 16) << 16, jnp.float32)
    exponent = ((word >> 23) & 255).astype(jnp.int32).astype(jnp.float32) - 126.0
    return scale, jnp.maximum(exponent, MIN_EXPONENT)


def key_products(plan: Plan, refs: Refs, state: Refs, part: int, page: jax.Array, token: jax.Array):
    """float32 [tokens, heads]: level times query, summed over the channels of one part of the keys."""
    decoder = plan.key_parts[part][0]
    query, centre, _ = state["queries"][part]
    planes = refs["keys"][part]

    def fetch(plane, _, byte, mask):
        rows = planes[plane].at[page[:, None], token[:, None], byte[None, :]]
        if mask is None:
            return triton.load(rows)
        mask = jnp.broadcast_to(mask[None, :], (page.shape[0], byte.shape[0]))
        return triton.load(rows, mask=mask, other=0)

    tiles = decoder.load(fetch)
    start = jnp.broadcast_to(centre[None, :], (page.shape[0], centre.shape[0]))
    sums: dict[int, jax.Array] = {}
    for piece in range(decoder.pieces):
        prepared = state["key_tables"][part]
        for weight, operand in decoder.operands(tiles, piece, prepared, plan.interpret):
            sums[weight] = sums.get(weight, start) + triton.dot(operand, query[piece], b_axis=1)
    return weighted(sums)


def weighted(sums: dict[int, jax.Array]) -> jax.Array:
    """Merges the digits of levels and of queries (or probabilities) in float32."""
    terms = [
        merge_digits(x).astype(jnp.float32) * (1.0 if weight == 1 else float(weight))
        for weight, x in sums.items()
    ]
    return sum(terms[1:], terms[0])


def scores(plan: Plan, refs: Refs, state: Refs, page: jax.Array, token: jax.Array):
    """(logits [tokens, heads] in base 2, the scale words of the groups) of tokens in these places."""
    words = [triton.load(ref.at[page, token]) for ref in refs["scales"]]
    total = None
    for part in range(len(plan.key_parts)):
        product = key_products(plan, refs, state, part, page, token)
        unit = state["queries"][part][2]
        term = product * key_scale(words[part])[:, None] * unit[None, :]
        total = term if total is None else total + term
    assert total is not None
    if "bias" in state:
        total = total + state["bias"][None, :]
    if plan.soft_cap is not None:
        # tanh(x) = 1 - 2 / (1 + exp(2 x)), which is right at both infinities
        grown = triton.exp2(total * (2.0 * LOG2E / plan.soft_cap), plan.interpret)
        total = plan.soft_cap * LOG2E * (1.0 - 2.0 / (1.0 + grown))
    return total, words


def pick(pages: list[jax.Array], which: jax.Array) -> jax.Array:
    """The page id of each row or column of a tile of several pages."""
    found = jnp.full(which.shape, pages[0], jnp.int32)
    for i, page in enumerate(pages[1:], start=1):
        found = jnp.where(which == i, page, found)
    return found


def tile_scores(plan: Plan, refs: Refs, state: Refs, block: jax.Array, pages: list[jax.Array]):
    """For each piece of the values' order: logits [columns, heads], EMPTY where unseen, and scale words."""
    order = plan.value_decoders[0]
    found = []
    for piece in range(order.pieces):
        which, token, _ = order.elements(piece, jnp.arange(order.columns))
        logits, words = scores(plan, refs, state, pick(pages, which), token)
        place = (block + which) * plan.tokens + token
        seen = (place < state["length"]) & (place >= state["start"])
        found.append((jnp.where(seen[:, None], logits, EMPTY), words))
    return found


def attend(plan: Plan, refs: Refs, state: Refs, block: jax.Array, pages: list[jax.Array], carry):
    """Adds the tile of `pages`, whose first one is the sequence's `block`, to the running sums."""
    peak, weight, mass, outputs = carry
    tile = tile_scores(plan, refs, state, block, pages)
    groups = range(len(plan.value_decoders))
    scales = [[value_scale(words[g]) for g in groups] for _, words in tile]
    bounds = []
    for (logits, _), of_groups in zip(tile, scales, strict=True):
        exponent = of_groups[0][1]
        for _, other in of_groups[1:]:
            exponent = jnp.maximum(exponent, other)
        bounds.append(logits + exponent[:, None])
    highest = bounds[0]
    for bound in bounds[1:]:
        highest = jnp.maximum(highest, bound)
    # The integers of P are units of this tile's peak, not of the running one: a rounding error is
    # at most 2**-15 of the largest term of its own tile.
    tile_peak = highest.max(axis=0)
    new_peak = jnp.maximum(peak, tile_peak)
    old, new = (triton.exp2(x - new_peak, plan.interpret) for x in (peak, tile_peak))
    terms = [triton.exp2(x - tile_peak[None, :], plan.interpret) for x, _ in tile]
    weight = weight * old[None, :] + sum(terms[1:], terms[0]) * new[None, :]
    mass, outputs = list(mass), list(outputs)
    for g in groups:
        shares = [p * s[g][0][:, None] for p, s in zip(terms, scales, strict=True)]
        if plan.value_decoders[g].centre:
            mass[g] = mass[g] * old[None, :] + sum(shares[1:], shares[0]) * new[None, :]
        product = value_products(plan, refs, state, g, pages, [x * UNITS for x in shares])
        outputs[g] = outputs[g] * old[None, :] + product * new[None, :]
    return new_peak, weight, tuple(mass), tuple(outputs)


def value_products(plan: Plan, refs: Refs, state: Refs, group: int, pages, shares):
    """float32 [channels, heads]: level times share, summed over the tokens of a tile."""
    decoder = plan.value_decoders[group]
    count = plan.value_channels[group]
    channel = jnp.arange(max(16, power_of_two(count)))
    exists = None if count == channel.shape[0] else (channel < count)[:, None]
    planes = refs["values"][group]

    def fetch(plane, which, byte, mask):
        del mask  # the tokens of whole pages always fill their columns
        place = planes[plane].at[pick(pages, which)[None, :], channel[:, None], byte[None, :]]
        if exists is None:
            return triton.load(place)
        mask = jnp.broadcast_to(exists, (channel.shape[0], byte.shape[0]))
        return triton.load(place, mask=mask, other=0)

    tiles = decoder.load(fetch)
    sums: dict[int, jax.Array] = {}
    start = jnp.zeros((channel.shape[0], 2 * plan.columns), jnp.int32)
    for piece in range(decoder.pieces):
        share = interleave_digits(shares[piece])
        prepared = state["value_tables"][group]
        for weight, operand in decoder.operands(tiles, piece, prepared, plan.interpret):
            sums[weight] = sums.get(weight, start) + triton.dot(operand, share, b_axis=0)
    return weighted(sums)


def decode_kernel(inputs: Refs, outputs: Refs, *, plan: Plan) -> None:
    """One program of the grid (split, kv head, sequence); writes the split's sums, see `combine`."""
    length = inputs["lengths"][0]
    start = inputs["starts"][0] if "starts" in inputs else jnp.int32(0)
    state: Refs = {"length": length, "start": start}
    state["queries"] = [
        prepare_query(plan, inputs["queries"][source], decoder, first, multiplier)
        for decoder, source, first, multiplier in plan.key_parts
    ]
    state["key_tables"] = [
        part[0].prepare(refs)
        for part, refs in zip(plan.key_parts, inputs["key_tables"], strict=True)
    ]
    state["value_tables"] = [
        decoder.prepare(refs)
        for decoder, refs in zip(plan.value_decoders, inputs["value_tables"], strict=True)
    ]
    if "bias" in inputs:
        head = jnp.arange(plan.columns)
        state["bias"] = triton.load(inputs["bias"].at[head], mask=head < plan.heads, other=0.0)

    first = start // plan.tokens
    blocks = jnp.maximum((length + plan.tokens - 1) // plan.tokens - first, 0)
    tiles = (blocks + plan.pages - 1) // plan.pages
    each = jnp.maximum((tiles + plan.splits - 1) // plan.splits, 1)
    begin = triton.program_id(0) * each
    end = jnp.minimum(begin + each, tiles)

    def body(i, carry):
        block = first + i * plan.pages
        pages = []
        for offset in range(plan.pages):  # beyond the last block its page stands in, unseen
            place = jnp.minimum(block + offset, first + blocks - 1)
            pages.append(inputs["page_table"][place])
        return attend(plan, inputs, state, block, pages, carry)

    order, columns = plan.value_decoders[0].columns, plan.columns
    zeros = jnp.zeros((order, columns), jnp.float32)
    accumulators = tuple(
        jnp.zeros((max(16, power_of_two(n)), columns), jnp.float32) for n in plan.value_channels
    )
    carry = (
        jnp.full((columns,), EMPTY, jnp.float32),
        zeros,
        tuple(zeros if decoder.centre else None for decoder in plan.value_decoders),
        accumulators,
    )
    peak, weight, mass, sums = lax.fori_loop(begin, end, body, carry)
    triton.store(outputs["peak"].at[jnp.arange(columns)], peak)
    triton.store(outputs["weight"].at[jnp.arange(columns)], weight.sum(axis=0))
    write_output(plan, outputs["sums"], mass, sums)


def write_output(plan: Plan, ref: Any, mass: tuple, sums: tuple) -> None:
    """Takes the centre out, and stores the groups of channels one after the other."""
    first = 0
    for decoder, count, lost, total in zip(
        plan.value_decoders, plan.value_channels, mass, sums, strict=True
    ):
        total = total * (1.0 / UNITS)
        if decoder.centre:
            total = total - (lost.sum(axis=0) * decoder.centre)[None, :]
        channel = jnp.arange(total.shape[0])[:, None]
        place = ref.at[first + channel, jnp.arange(plan.columns)[None, :]]
        exists = jnp.broadcast_to(channel < count, total.shape)
        triton.store(place, total * decoder.codebook.step, mask=exists)
        first += count
