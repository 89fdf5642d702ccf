"""Fifteen-bit right operands of 8-bit products: two base-128 digits in two neighbouring columns.

The narrowest product has 8 columns. With the high and the low digit of a head side by side, four
heads fill it, so that for a query group of four the second digit costs nothing. Integer sums are
exact.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.primitives import triton

# Two digits in base 128, the high one at most 127.
UNITS = 127 * 128
# 1.5 * 2**23: adding it leaves an integer in the low bits of a float32.
MAGIC = 12582912.0
# The scores of a tile come in two tiles, of the even and of the odd columns of the values'
# operand. Two bytes of a register of P are then at hand in one thread, and the tokens of a tile
# come in pairs of neighbours, whose keys fill whole memory lines (with four phases, half lines: 3
# to 5 % slower).
PHASES = 2


def digits(x: jax.Array, bound: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """|x| < bound -> int8 (high, low) with high * 128 + low = round(x * UNITS / bound)."""
    shifted = triton.fma(x, jnp.full_like(x, UNITS / bound), jnp.full_like(x, MAGIC + 64.0))
    bits = lax.bitcast_convert_type(shifted, jnp.int32)
    # the bits of MAGIC itself are cut off by the conversion to a byte
    return (bits >> 7).astype(jnp.int8), ((bits & 127) - 64).astype(jnp.int8)


def merge_digits(product: jax.Array) -> jax.Array:
    """int32 [rows, 2 * heads] -> float32 high * 128 + low, [rows, heads]."""
    rows, columns = product.shape
    high, low = jnp.unstack(product.reshape(rows, columns // 2, 2), axis=-1)
    return (high * 128 + low).astype(jnp.float32)


def interleave(phases: list[jax.Array], bound: float) -> jax.Array:
    """PHASES float tiles [rows, heads] -> digits [PHASES * rows, 2 * heads], row 2 r + phase."""
    both = [jnp.stack(digits(x, bound), axis=-1) for x in phases]
    rows, heads, _ = both[0].shape
    both = [x.reshape(rows, 2 * heads) for x in both]
    pairs = jnp.stack(both, axis=-1)
    return pairs.transpose(0, 2, 1).reshape(PHASES * rows, 2 * heads)


def total(terms: list[jax.Array]) -> jax.Array:
    """The sum of a list."""
    return sum(terms[1:], terms[0])


def weighted(
    start: jax.Array, products: list[tuple[int, jax.Array, jax.Array]], b_axis: int
) -> jax.Array:
    """start + the products of weighted operands with their digits, merged, in float32."""
    sums: dict[int, jax.Array] = {}
    for weight, operand, right in products:
        before = sums.get(weight, start if weight == 1 else jnp.zeros_like(start))
        sums[weight] = before + triton.dot(operand, right, b_axis=b_axis)
    terms = [merge_digits(x) if w == 1 else merge_digits(x) * float(w) for w, x in sums.items()]
    return total(terms)
