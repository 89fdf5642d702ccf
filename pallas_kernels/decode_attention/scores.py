"""Scores of compressed keys: int8 levels times 15-bit queries, exact sums, one scale a token."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.decode_attention.exact import capped
from pallas_kernels.primitives import triton
from pallas_kernels.primitives.blocks import key_scale
from pallas_kernels.primitives.dequantize import divide, power_of_two
from pallas_kernels.primitives.digits import UNITS, digits, weighted
from pallas_kernels.primitives.gather import Decoder

# The exponent field of a float32 that stands for 2**0.
BIAS = 127
# Shares times a value's scale are below this: a scale over 2**(its exponent) is.
BOUND = 2.0
# The exponent field of infinity and NaN.
NOT_FINITE = 255
# Smaller value scales are as good as 0 (2**-60); keeps exp2(score - peak) finite.
MIN_EXPONENT = BIAS - 61
Refs = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """The static facts. A key part is (decoder, query input, first channel, multiplier).

    `scale` multiplies a product <q, k>, to base 2 unless the scores are soft-capped. `row_pages`:
    pages of a row of the pool. `exact_tiles`: as many tiles as the tokens in full precision
    count for.
    """

    tokens: int
    pages: int
    heads: int
    key_parts: tuple[tuple[Decoder, int, int, float], ...]
    value_decoders: tuple[Decoder, ...]
    value_channels: tuple[int, ...]
    scale: float
    soft_cap: float | None
    batch: int
    row_pages: int
    exact_tiles: int
    splits: int
    warps: int
    stages: int

    @property
    def columns(self) -> int:
        """Query heads of a group, padded: twice as many columns fill a product of 8."""
        return max(4, power_of_two(self.heads))


def _query_rows(
    plan: DecodePlan, ref: Any, decoder: Decoder, first: int, head: jax.Array
) -> jax.Array:
    """float32 [len(head), columns] of the channels that the columns stand for, 0 where none."""
    _, channel, exists = decoder.elements(jnp.arange(decoder.columns))
    mask = (head < plan.heads)[:, None] & exists[None, :]
    rows = ref.at[head[:, None], (first + channel)[None, :]]
    return triton.load(rows, mask=mask, other=0.0).astype(jnp.float32)


def prepare_query(
    plan: DecodePlan, ref: Any, decoder: Decoder, first: int, multiplier: float
) -> tuple:
    """(int8 digits [2 * heads, columns], centre int32 [2 * heads], unit float32 [heads]).

    The unit is NaN for a query that is not finite.
    """
    row = jnp.arange(2 * plan.columns)
    x = _query_rows(plan, ref, decoder, first, divide(row, 2)[0])
    # as integers, of which that of NaN is the largest: a maximum of floats passes it over
    magnitude = lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
    largest = lax.bitcast_convert_type(magnitude.max(axis=1), jnp.float32)
    largest = jnp.where(largest < jnp.inf, jnp.maximum(largest, 1e-30), jnp.nan)
    high, low = digits(x * (0.999999 / largest)[:, None])
    digit = jnp.where((row & 1 == 0)[:, None], high, low)
    centre = digit.astype(jnp.int32).sum(axis=1) * -decoder.centre
    largest, _ = jnp.unstack(largest.reshape(plan.columns, 2), axis=-1)
    return digit, centre, largest * (multiplier / (0.999999 * UNITS))


def value_exponent(words: list[jax.Array]) -> jax.Array:
    """int32 e with |scale| < BOUND * 2**(e - BIAS) for the value scales of all groups.

    NOT_FINITE if one of them is not.
    """
    found = jnp.full(words[0].shape, MIN_EXPONENT, jnp.int32)
    for word in words:
        found = jnp.maximum(found, ((word >> 23) & 255).astype(jnp.int32))
    return found


def key_products(
    plan: DecodePlan, refs: Refs, state: Refs, part: int, page: jax.Array, token: jax.Array
):
    """float32 [tokens, heads]: level times query, summed over the channels of one part."""
    decoder = plan.key_parts[part][0]
    query, centre, _ = state["queries"][part]
    planes = refs["keys"][part]

    def fetch(plane, _, byte, mask):
        rows = planes[plane].at[page[:, None], token[:, None], byte[None, :]]
        if mask is None:
            return triton.load(rows)
        mask = jnp.broadcast_to(mask[None, :], (page.shape[0], byte.shape[0]))
        return triton.load(rows, mask=mask, other=0)

    start = jnp.broadcast_to(centre[None, :], (page.shape[0], centre.shape[0]))
    operands = decoder.operands(decoder.load(fetch), state["key_tables"][part])
    return weighted(start, operands, query, b_axis=1)


def scores(
    plan: DecodePlan,
    refs: Refs,
    state: Refs,
    page: jax.Array,
    token: jax.Array,
    words: list[jax.Array],
    mean: tuple | None,
) -> list[tuple[jax.Array, jax.Array]]:
    """Logits in base 2 of tokens in these places, [tokens, heads], as (x, y) of a sum of x * y."""
    terms = []
    for part in range(len(plan.key_parts)):
        product = key_products(plan, refs, state, part, page, token)
        scaled = product * key_scale(words[part])[:, None]
        unit = jnp.broadcast_to(state["queries"][part][2][None, :], scaled.shape)
        terms.append((scaled, unit))
    if mean is not None:
        product, unit = mean
        terms.append(
            (jnp.broadcast_to(product, scaled.shape), jnp.broadcast_to(unit, scaled.shape))
        )
    if plan.soft_cap is None:
        return terms
    total = jnp.zeros_like(scaled)
    for scaled, unit in terms:
        total = triton.fma(scaled, unit, total)
    total = capped(total, plan.soft_cap)
    return [(total, jnp.ones_like(total))]
