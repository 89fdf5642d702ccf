"""What a program of the decode kernel does with a tile of compressed tokens."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.decode_attention import uncoded
from pallas_kernels.decode_attention.exact import EMPTY
from pallas_kernels.decode_attention.phases import MANY
from pallas_kernels.decode_attention.scores import (
    BIAS,
    BOUND,
    NOT_FINITE,
    DecodePlan,
    Refs,
    scores,
    value_exponent,
)
from pallas_kernels.primitives import triton
from pallas_kernels.primitives.blocks import load_scales, value_scale
from pallas_kernels.primitives.digits import PHASES, interleave, total, weighted


def pick(pages: list[jax.Array], which: jax.Array) -> jax.Array:
    """The page id of each row or column of a tile of several pages."""
    found = jnp.full(which.shape, pages[0], jnp.int32)
    for i, page in enumerate(pages[1:], start=1):
        found = jnp.where(which == i, page, found)
    return found


def place_of(plan: DecodePlan, phase: int) -> tuple[jax.Array, jax.Array]:
    """Page and token of each row of a phase."""
    order = plan.value_order
    column = PHASES * jnp.arange(order.columns // PHASES) + phase
    which, token, _ = order.elements(column)
    return which, token


def tile_scores(
    plan: DecodePlan, refs: Refs, state: Refs, block: jax.Array, pages: list[jax.Array], digits
):
    """For each phase: logits + exponent [rows, heads], EMPTY where unseen, the exponent, the scale

    words, and (page, token, seen) of the rows. Row r of phase j is the token in column 2 r + j of
    the values' operand.
    """
    found = []
    for phase in range(PHASES):
        which, token = place_of(plan, phase)
        page = pick(pages, which)
        place = (block + which) * plan.tokens + token
        seen = place < state["length"]
        if "start" in state:
            seen = seen & (place >= state["start"])
        # what lies in an unseen place may be NaN, as a scale, which a score of EMPTY would not stop
        count = len(refs["scales"])
        words = [load_scales(refs, number, (page, token), seen) for number in range(count)]
        mean = state.get("mean")
        if digits is not None:
            mean = state["turning"].product(phase, digits)
        if plan.uncoded[1]:
            exponent = jnp.full(page.shape, BIAS, jnp.int32)
        else:
            exponent = value_exponent(words[: max(plan.value_words) + 1])
        addend, by_row = exponent.astype(jnp.float32), plan.columns > MANY and not plan.uncoded[0]
        if by_row:  # a scale of 0 adds 0 to it, and a row of many scores is asked once
            addend = jnp.where(seen, addend, EMPTY)
        bound = addend[:, None]
        for x, y in reversed(scores(plan, refs, state, page, token, words, mean)):
            bound = triton.fma(x, y, bound)
        if not by_row:
            bound = jnp.where(seen[:, None], bound, EMPTY)
        found.append((bound, exponent, words, (page, token, seen)))
    return found


def attend(
    plan: DecodePlan,
    refs: Refs,
    state: Refs,
    block: jax.Array,
    pages: list[jax.Array],
    carry,
    digits,
):
    """Adds the tile of `pages`, whose first one is the sequence's `block`, to the running sums.

    The integers of P are units of this tile's peak, not of the running one: a rounding error is at
    most 2**-15 of the largest term of its own tile. The peak counts the value's scale in, by its
    exponent, so that every share of a value stays below BOUND.

    What is not finite ends up in `weight` by arithmetic alone. A score that is NaN or +infinity
    makes NaN of its term, whether the peak took notice of it or not; and for a value's scale that
    is not finite `down` is -infinity, so that no sum of weights is positive again.
    """
    peak, weight, mass, outputs = carry
    tile = tile_scores(plan, refs, state, block, pages, digits)
    highest = tile[0][0]
    for bound, *_ in tile[1:]:
        highest = jnp.maximum(highest, bound)
    tile_peak = highest.max(axis=0)
    new_peak = jnp.maximum(peak, tile_peak)
    old, new = (triton.exp2(x - new_peak)[None, :] for x in (peak, tile_peak))

    terms = []
    for bound, exponent, *_ in tile:
        down = lax.bitcast_convert_type((NOT_FINITE - 1 - exponent) << 23, jnp.float32)
        terms.append(triton.exp2(bound - tile_peak[None, :]) * down[:, None])
    weight = triton.fma(total(terms), jnp.broadcast_to(new, weight.shape), weight * old)
    if plan.uncoded[1]:
        product = uncoded.value_products(refs["values"][0][0], [x[3] for x in tile], terms)
        outputs = [triton.fma(product, jnp.broadcast_to(new, product.shape), outputs[0] * old)]
        return new_peak, weight, mass, tuple(outputs)
    mass, outputs = list(mass), list(outputs)
    for g, decoder in enumerate(plan.value_decoders):
        scales = [value_scale(words[plan.value_words[g]]) for _, _, words, _ in tile]
        shares = [p * scale[:, None] for p, scale in zip(terms, scales, strict=True)]
        if decoder.centre:
            mass[g] = triton.fma(total(shares), jnp.broadcast_to(new, weight.shape), mass[g] * old)
        product = value_products(plan, refs, state, g, pages, shares)
        outputs[g] = triton.fma(product, jnp.broadcast_to(new, product.shape), outputs[g] * old)
    return new_peak, weight, tuple(mass), tuple(outputs)


def value_products(plan: DecodePlan, refs: Refs, state: Refs, group: int, pages, shares):
    """float32 [channels, heads]: level times share, summed over the tokens of a tile."""
    decoder = plan.value_decoders[group]
    count = plan.value_channels[group]
    channel = jnp.arange(plan.value_rows(group))
    exists = None if count == channel.shape[0] else (channel < count)[:, None]
    planes = refs["values"][group]

    def fetch(plane, which, byte, mask, back=0):  # `back` channels before each
        del mask  # the tokens of whole pages always fill their columns
        row = (channel if not back else jnp.maximum(channel - back, 0))[:, None]
        place = planes[plane].at[pick(pages, which)[None, :], row, byte[None, :]]
        inside = exists if not back else (channel >= back)[:, None]
        if inside is None:
            return triton.load(place)
        if back and exists is not None:
            inside = inside & exists
        mask = jnp.broadcast_to(inside, (channel.shape[0], byte.shape[0]))
        return triton.load(place, mask=mask, other=0)

    start = jnp.zeros((channel.shape[0], 2 * plan.columns), jnp.int32)
    operands = decoder.operands(decoder.load(fetch), state["value_tables"][group])
    right = interleave(shares, BOUND)
    return weighted(start, [(*operand, right) for operand in operands], b_axis=0)
