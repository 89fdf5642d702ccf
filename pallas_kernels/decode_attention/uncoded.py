"""Keys, or values, of the blocks in full precision: products of 16 bits beside those of codes.

The other operand, queries or shares, is exact enough in two parts of 16 bits, which lie in
neighbouring columns, as the two digits do where codes are multiplied.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.exact import nan_unless_finite
from pallas_kernels.primitives import triton
from pallas_kernels.primitives.dequantize import divide, power_of_two
from pallas_kernels.primitives.digits import PHASES, total
from pallas_kernels.primitives.rotation import merge, split

PARTS = 2


@dataclasses.dataclass(frozen=True)
class TokenOrder:
    """Which token each row of a phase is, where no decoder of values says it.

    Tokens of a phase follow each other, so that their keys and values are whole memory lines.
    """

    tokens: int
    pages: int

    @property
    def columns(self) -> int:
        """Tokens of a tile."""
        return self.tokens * self.pages

    def elements(self, column: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(page, token, whether there is one) of each column."""
        row, phase = divide(column, PHASES)
        page, token = divide(phase * (self.columns // PHASES) + row, self.tokens)
        return page, token, column >= 0


def key_products(ref: Any, query: jax.Array, page: jax.Array, token: jax.Array) -> jax.Array:
    """float32 [tokens, heads]: keys in these places times the parts of the queries."""
    keys = triton.load(_rows(ref, page, token), mask=_inside(ref, page), other=0.0)
    return nan_unless_finite(merge(triton.float_dot(keys, query, 1, 1), PARTS))


def value_products(
    ref: Any, places: list[tuple[jax.Array, jax.Array, jax.Array]], shares: list[jax.Array]
) -> jax.Array:
    """float32 [channels, heads]: values times shares, summed over the tokens of all phases.

    places: page and token of each row of a phase, and whether it is seen; what is not may be NaN.
    """
    products = []
    for (page, token, seen), share in zip(places, shares, strict=True):
        inside, mask = _inside(ref, page), seen[:, None]
        mask = jnp.broadcast_to(mask, (*page.shape, _channels(ref).shape[0])) & inside
        values = triton.load(_rows(ref, page, token), mask=mask, other=0.0)
        parts = split(share, values.dtype, PARTS)
        products.append(merge(triton.float_dot(values, parts, 0, 0), PARTS))
    return total(products)


def _channels(ref: Any) -> jax.Array:
    return jnp.arange(max(16, power_of_two(ref.shape[-1])))


def _rows(ref: Any, page: jax.Array, token: jax.Array) -> Any:
    return ref.at[page[:, None], token[:, None], _channels(ref)[None, :]]


def _inside(ref: Any, page: jax.Array) -> jax.Array:
    channel = _channels(ref)
    return jnp.broadcast_to((channel < ref.shape[-1])[None, :], (*page.shape, channel.shape[0]))
