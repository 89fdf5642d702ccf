"""Scores of compressed keys: int8 levels times 15-bit queries, exact sums, one scale a token."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.decode_attention import uncoded
from pallas_kernels.decode_attention.exact import capped
from pallas_kernels.decode_attention.uncoded import TokenOrder
from pallas_kernels.primitives import triton
from pallas_kernels.primitives.blocks import ShortScales, Word, key_scale, value_scale
from pallas_kernels.primitives.dequantize import MIN_COLUMNS, beside, divide, power_of_two
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
class KeyGroup:
    """A group of channels of the keys: a plane set, its first channel, and what multiplies its

    queries so that one unit serves all groups of a sum: its step, in the largest one.
    """

    decoder: Decoder
    planes: int
    first: int
    gain: float


@dataclasses.dataclass(frozen=True)
class KeySum:
    """Groups that share a scale: their products are integers in one unit, and added up as such.

    `products`: what the tensor cores multiply at once, groups side by side of as many columns each,
    None for zeros. `source`: of the queries, `word`: of the scales, which one. The real size of a
    unit is `multiplier` times that of the query.
    """

    products: tuple[tuple[KeyGroup | None, ...], ...]
    source: int
    word: int
    multiplier: float

    @property
    def groups(self) -> tuple[KeyGroup, ...]:
        """All of them."""
        return tuple(group for product in self.products for group in product if group is not None)


def key_sum(groups: tuple[KeyGroup, ...], *, source: int, word: int, multiplier: float) -> KeySum:
    """Groups too narrow for a product of their own share one."""
    wide = [group for group in groups if group.decoder.columns >= MIN_COLUMNS]
    products: list[tuple[KeyGroup | None, ...]] = [(group,) for group in wide]
    narrow: dict[int, list[KeyGroup | None]] = {}
    for group in groups:
        if group.decoder.columns < MIN_COLUMNS:
            narrow.setdefault(group.decoder.columns, []).append(group)
    for columns, found in narrow.items():
        count = MIN_COLUMNS // columns
        found += [None] * (-len(found) % count)
        products += [tuple(found[i : i + count]) for i in range(0, len(found), count)]
    return KeySum(tuple(products), source, word, multiplier)


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """The static facts.

    `scale` multiplies a product <q, k>, to base 2 unless the scores are soft-capped. `row_pages`:
    pages of a row of the pool. `value_words`: which of the scales each group of values has.
    `exact_tiles`: as many tiles as the tokens in full precision count for. `dealt`: whether the
    splits of a sequence depend on the lengths (`deal`). `uncoded`: whether the
    keys, and the values, of the blocks are in full precision; then there are no `key_sums`, or no
    `value_decoders`.
    """

    tokens: int
    pages: int
    heads: int
    key_sums: tuple[KeySum, ...]
    value_decoders: tuple[Decoder, ...]
    value_channels: tuple[int, ...]
    value_words: tuple[int, ...]
    scale: float
    soft_cap: float | None
    batch: int
    row_pages: int
    exact_tiles: int
    splits: int
    warps: int
    stages: int
    dealt: bool
    uncoded: tuple[bool, bool] = (False, False)

    @property
    def key_groups(self) -> tuple[KeyGroup, ...]:
        """In the order of their planes."""
        groups = (group for keys in self.key_sums for group in keys.groups)
        return tuple(sorted(groups, key=lambda group: group.planes))

    @property
    def value_order(self) -> Decoder | TokenOrder:
        """In which the tokens of a tile come."""
        if self.value_decoders:
            return self.value_decoders[0]
        return TokenOrder(self.tokens, self.pages)

    def value_rows(self, group: int) -> int:
        """Channels of a group of values, padded.

        A look-up takes four neighbouring bytes of a row from one thread. Of fewer rows a warp, each
        with 8 bytes, a thread has only two.
        """
        return max(16 * self.warps, power_of_two(self.value_channels[group]))

    @property
    def columns(self) -> int:
        """Query heads of a group, padded: twice as many columns fill a product of 8."""
        return max(4, power_of_two(self.heads))


def _query_rows(plan: DecodePlan, ref: Any, group: KeyGroup, head: jax.Array) -> jax.Array:
    """float32 [len(head), columns] of the channels that the columns stand for, 0 where none."""
    _, channel, exists = group.decoder.elements(jnp.arange(group.decoder.columns))
    mask = (head < plan.heads)[:, None] & exists[None, :]
    rows = ref.at[head[:, None], (group.first + channel)[None, :]]
    x = triton.load(rows, mask=mask, other=0.0).astype(jnp.float32)
    return x if group.gain == 1.0 else x * group.gain


def prepare_query(plan: DecodePlan, ref: Any, keys: KeySum) -> tuple:
    """(of each product int8 digits [2 * heads, columns], centre int32 [2 * heads], unit float32

    [heads]). The unit is NaN for a query that is not finite.
    """
    row = jnp.arange(2 * plan.columns)
    head = divide(row, 2)[0]
    rows = {group: _query_rows(plan, ref, group, head) for group in keys.groups}
    # as integers, of which that of NaN is the largest: a maximum of floats passes it over
    sizes = [
        (lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF).max(axis=1) for x in rows.values()
    ]
    largest = lax.bitcast_convert_type(functools.reduce(jnp.maximum, sizes), jnp.float32)
    largest = jnp.where(largest < jnp.inf, jnp.maximum(largest, 1e-30), jnp.nan)
    products, centre = [], None
    for product in keys.products:
        tiles: list[jax.Array | None] = []
        for group in product:
            if group is None:
                tiles.append(None)
                continue
            high, low = digits(rows[group] * (0.999999 / largest)[:, None])
            digit = jnp.where((row & 1 == 0)[:, None], high, low)
            lost = digit.astype(jnp.int32).sum(axis=1) * -group.decoder.centre
            centre = lost if centre is None else centre + lost
            tiles.append(digit)
        products.append(_side_by_side(tiles))
    largest, _ = jnp.unstack(largest.reshape(plan.columns, 2), axis=-1)
    return products, centre, largest * (keys.multiplier / (0.999999 * UNITS))


def _side_by_side(tiles: list[jax.Array | None]) -> jax.Array:
    """Tiles as one, of zeros where there is none."""
    like = next(tile for tile in tiles if tile is not None)
    return beside([jnp.zeros_like(like) if tile is None else tile for tile in tiles])


def value_exponent(words: list[Word]) -> jax.Array:
    """int32 e with |scale| < BOUND * 2**(e - BIAS) for the value scales of all groups.

    NOT_FINITE if one of them is not.
    """
    shape = words[0].value.shape if isinstance(words[0], ShortScales) else words[0].shape
    found = jnp.full(shape, MIN_EXPONENT, jnp.int32)
    for word in words:
        if isinstance(word, ShortScales) or word.dtype != jnp.uint32:  # no halves
            word = lax.bitcast_convert_type(value_scale(word), jnp.uint32)
        found = jnp.maximum(found, ((word >> 23) & 255).astype(jnp.int32))
    return found


def key_products(
    plan: DecodePlan, refs: Refs, state: Refs, number: int, page: jax.Array, token: jax.Array
):
    """float32 [tokens, heads]: level times query, summed over the channels of one sum."""
    keys, (queries, centre, _) = plan.key_sums[number], state["queries"][number]

    def operands(group: KeyGroup) -> list[tuple[int, jax.Array]]:
        planes = refs["keys"][group.planes]

        def fetch(plane, _, byte, mask):
            rows = planes[plane].at[page[:, None], token[:, None], byte[None, :]]
            if mask is None:
                return triton.load(rows)
            mask = jnp.broadcast_to(mask[None, :], (page.shape[0], byte.shape[0]))
            return triton.load(rows, mask=mask, other=0)

        decoder = group.decoder
        return decoder.operands(decoder.load(fetch), state["key_tables"][group.planes])

    start = jnp.broadcast_to(centre[None, :], (page.shape[0], centre.shape[0]))
    products = []
    for product, query in zip(keys.products, queries, strict=True):
        if len(product) == 1 and product[0] is not None:
            products += [(weight, tile, query) for weight, tile in operands(product[0])]
            continue
        found = [[] if group is None else operands(group) for group in product]
        for i in range(max(map(len, found))):
            weights = {tiles[i][0] for tiles in found if i < len(tiles)}
            products += [
                (
                    weight,
                    _side_by_side(
                        [
                            tiles[i][1] if i < len(tiles) and tiles[i][0] == weight else None
                            for tiles in found
                        ]
                    ),
                    query,
                )
                for weight in sorted(weights)
            ]
    return weighted(start, products, b_axis=1)


def scores(
    plan: DecodePlan,
    refs: Refs,
    state: Refs,
    page: jax.Array,
    token: jax.Array,
    words: list[Word],
    mean: tuple | None,
) -> list[tuple[jax.Array, jax.Array]]:
    """Logits in base 2 of tokens in these places, [tokens, heads], as (x, y) of a sum of x * y."""
    terms = []
    if plan.uncoded[0]:
        scaled = uncoded.key_products(refs["keys"][0][0], state["uncoded_query"], page, token)
        terms.append((scaled, jnp.full_like(scaled, plan.scale)))
    for number, keys in enumerate(plan.key_sums):
        product = key_products(plan, refs, state, number, page, token)
        scaled = product * key_scale(words[keys.word])[:, None]
        unit = jnp.broadcast_to(state["queries"][number][2][None, :], scaled.shape)
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
