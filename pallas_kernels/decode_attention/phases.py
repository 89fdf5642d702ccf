"""The product of a query with a mean that turns with the position, as a rotary embedding turns it.

<q, R_p m> is the sum over pairs of channels of A cos(p w) + B sin(p w), with A = q1 m1 + q2 m2 and
B = q2 m1 - q1 m2. The token p is the t-th of 64, which begin at a phase of their own: (A, B) turned
back by that phase, once for 64 tokens, times a constant table of t. The table holds bytes, and so
stays in the registers of a program; (A, B) are 16-bit integers in two digits, as queries are.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8

from pallas_kernels.primitives import triton
from pallas_kernels.primitives.dequantize import MIN_COLUMNS, divide, power_of_two
from pallas_kernels.primitives.digits import MAGIC

# Tokens of a turn of the table.
PERIOD = 64
# Steps of the table.
STEPS = 127
# Coefficients are integers up to this one: two digits in base 256, both signed.
LIMIT = 32600.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PhasesOperand:
    """Angles by which the mean of the blocks' keys is turned at each token.

    Token 64 J + t of the blocks has the angles E_J e_t: E_J = coarse[J // 64] fine[J % 64], the last
    row of `coarse` beyond its end; e_t = within[t], bytes in units of 1 / 127, which `coarse` has as
    a factor. Of each pair the cosine and the sine lie side by side. Pair c of the first `rotary`
    channels is (c, c + rotary / 2); those beyond are paired in the same way among themselves.
    """

    coarse: Float[Array, "_ H"]
    fine: Float[Array, "64 H"]
    within: Int8[Array, "64 H"]
    rotary: int = dataclasses.field(metadata=dict(static=True))


def _pairs(refs: Any) -> tuple[int, int]:
    """Number of pairs, and padded."""
    count = refs.fine.shape[1] // 2
    return count, max(MIN_COLUMNS // 2, power_of_two(count))


def _load(ref: Any, place: tuple, inside: jax.Array | None) -> jax.Array:
    if inside is None:
        return triton.load(ref.at[place])
    return triton.load(ref.at[place], mask=inside, other=jnp.zeros((), ref.dtype))


def table(refs: Any, position: jax.Array) -> jax.Array:
    """int8 [rows, 2 * pairs] of tokens at these positions."""
    count, padded = _pairs(refs)
    column = jnp.arange(2 * padded)[None, :]
    row = divide(position, PERIOD)[1][:, None]
    shape = position.shape[0], 2 * padded
    inside = None if count == padded else jnp.broadcast_to(column < 2 * count, shape)
    return _load(refs.within, (row, column), inside)


def coefficients(
    refs: Any,
    query: Any,
    mean: Any,
    row: jax.Array,
    columns: int,
    heads: int,
    scale: float,
    warps: int,
):
    """(A, B) float32 [columns, pairs] below 1, and their unit [columns], NaN unless finite."""
    count, padded = _pairs(refs)
    pair, half = jnp.arange(padded), refs.rotary // 2
    first, second = pair, pair + count
    if half != count:
        first = jnp.where(pair < half, pair, pair + half)
        second = jnp.where(pair < half, pair + half, pair + count)
    inside = None if count == padded else pair < count
    m1, m2 = (_load(mean, (row, c), inside).astype(jnp.float32) for c in (first, second))
    found, units = [], []
    for head in range(heads):
        q1, q2 = (_load(query, (head, c), inside).astype(jnp.float32) for c in (first, second))
        a, b = q1 * m1 + q2 * m2, q2 * m1 - q1 * m2
        size = lax.bitcast_convert_type(jnp.abs(a) + jnp.abs(b), jnp.int32)
        largest = lax.bitcast_convert_type(size.max(), jnp.float32)
        largest = jnp.where(largest < jnp.inf, jnp.maximum(largest, 1e-30), jnp.nan)
        factor = LIMIT * STEPS / largest
        found.append(tuple(_shared_out(x * factor, warps) for x in (a, b)))
        units.append(largest)
    column, unit = jnp.arange(columns), jnp.zeros((columns,), jnp.float32)
    for head, largest in enumerate(units):
        unit = jnp.where(column == head, largest, unit)
    return found, unit * (scale / (LIMIT * STEPS))


def factors(refs: Any, turn: jax.Array) -> list[jax.Array]:
    """Rows of the coarse and the fine table."""
    count, padded = _pairs(refs)
    big = jnp.minimum(turn >> 6, refs.coarse.shape[0] - 1)
    small = turn & (PERIOD - 1)
    column = jnp.arange(2 * padded)
    inside = None if count == padded else column < 2 * count
    return [
        _load(ref, (at, column), inside) for ref, at in ((refs.coarse, big), (refs.fine, small))
    ]


def _halved(x: jax.Array) -> tuple[jax.Array, ...]:
    """Elements of even and odd places."""
    return tuple(jnp.unstack(x.reshape(-1, 2), axis=-1))


def _shared_out(x: jax.Array, warps: int) -> tuple[jax.Array, ...]:
    """The elements of each thread apart from each other, if it has two."""
    return _halved(x) if x.shape[0] >= 2 * triton.LANES * warps else (x,)


def _beside(parts: list[jax.Array]) -> jax.Array:
    """2**n arrays [..., ] as the last axis of one."""
    shape = parts[0].shape
    count = len(parts)
    while len(parts) > 1:
        half = len(parts) // 2
        parts = [jnp.stack([parts[i], parts[i + half]], axis=-1) for i in range(half)]
    return parts[0].reshape(*shape, count)


def turned(ab, factors, columns: int, warps: int) -> jax.Array:
    """int8 [2 * pairs, 2 * columns]: digits of (A, B) turned back by the phase of a turn."""
    (c1, s1), (c2, s2) = map(_halved, factors)
    cos = triton.fma(c1, c2, -(s1 * s2))
    sin = triton.fma(c1, s2, s1 * c2)
    cos, sin, back = (_shared_out(x, warps) for x in (cos, sin, -sin))
    found = [[] for _ in range(2 * len(cos))]
    for a, b in ab:
        for i in range(len(cos)):
            magic = jnp.full_like(a[i], MAGIC + 128.0)
            x = triton.fma(a[i], cos[i], triton.fma(b[i], sin[i], magic))
            y = triton.fma(b[i], cos[i], triton.fma(a[i], back[i], magic))
            for k, z in ((2 * i, x), (2 * i + 1, y)):
                bits = lax.bitcast_convert_type(z, jnp.int32)
                found[k] += [(bits >> 8).astype(jnp.int8), (bits ^ 128).astype(jnp.int8)]
    for part in found:
        part += [jnp.zeros_like(part[0])] * (2 * columns - len(part))
    right = _beside([_beside(part) for part in found])
    return right.transpose(0, 2, 1).reshape(-1, 2 * columns)


def product(left: jax.Array, right: jax.Array) -> jax.Array:
    """float32 [rows, columns]."""
    found = triton.dot(left, right, b_axis=0)
    rows, columns = found.shape
    high, low = jnp.unstack(found.reshape(rows, columns // 2, 2), axis=-1)
    return (high * 256 + low).astype(jnp.float32)
