"""The product of a query with a mean that turns with the position, as a rotary embedding turns it.

<q, R_p m> is the sum over pairs of channels of A cos(p w) + B sin(p w), with A = q1 m1 + q2 m2 and
B = q2 m1 - q1 m2. Of 64 tokens that begin at a multiple of 64, (A, B) are turned back by the angle
of the first, once for all, and multiply a constant table: a product of bytes on the tensor cores,
where (A, B) are 16-bit integers in two digits, as queries are in `digits`.
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
from pallas_kernels.primitives.period import PERIOD, STEPS

# Coefficients are integers up to this one: two signed digits in base 256.
LIMIT = 32600.0
# Columns of one head after the other; more are one array, whose code does not grow with them.
MANY = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PhasesOperand:
    """Angles by which the mean of the blocks' keys is turned at each of their tokens.

    Token 64 J + t has the angles E_J e_t. E_J = coarse[J // 64] fine[J % 64], complex, beyond the
    end of `coarse` its last row: cosines of the pairs in the first half of the columns, sines in
    the second. e_t = within[t]: bytes, cosine and sine of a pair side by side, in units of 1 / 127,
    a factor that `coarse` has. Pair c of the first `rotary` channels is (c, c + rotary / 2); those
    beyond are paired in the same way among themselves.
    """

    coarse: Float[Array, "_ H"]
    fine: Float[Array, "64 H"]
    within: Int8[Array, "64 H"]
    rotary: int = dataclasses.field(metadata=dict(static=True))


def check_phases(phases: PhasesOperand, channels: int) -> None:
    """Raises unless the tables are those of so many channels."""
    shapes = phases.fine.shape, phases.within.shape, phases.coarse.shape[1:]
    expected = (PERIOD, channels), (PERIOD, channels), (channels,)
    if shapes != expected or phases.within.dtype != jnp.int8:
        raise ValueError(
            f"phases: got fine {shapes[0]}, within {phases.within.dtype}{list(shapes[1])} and rows "
            f"of coarse {shapes[2]}, expected {expected[0]}, int8{list(expected[1])}, {expected[2]}"
        )
    if phases.rotary % 2 or not 0 <= phases.rotary <= channels or channels % 2:
        raise ValueError(f"rotary: got {phases.rotary} of {channels} channels, expected even ones")


@dataclasses.dataclass(frozen=True)
class Turning:
    """What a program holds of it, and what it does with that.

    tables: of each phase of a tile, int8 [rows, 2 * pairs]. turns: of each phase, which of the
    tile's `count` turns a row is in, [rows]. coefficients: (A, B) of each head, in
    `warps` warps' registers; unit [columns] that of the products, NaN for a query or a mean that is
    not finite. Of many columns the coefficients are two arrays [pairs, columns].
    """

    phases: Any
    tables: list[jax.Array]
    turns: list[jax.Array]
    count: int
    coefficients: list[tuple] | tuple[jax.Array, jax.Array]
    unit: jax.Array
    warps: int

    def angles(self, turn: jax.Array) -> list[list[jax.Array]]:
        """Cosines and sines of the coarse and of the fine angle, of each turn of a tile."""
        return [_angles(self.phases, turn + i) for i in range(self.count)]

    def digits(self, angles: list[list[jax.Array]]) -> list[jax.Array]:
        """int8 [2 * pairs, 2 * columns]: (A, B) turned back by the angles of each turn."""
        if isinstance(self.coefficients, tuple):
            return [_digits_of_many(*self.coefficients, x) for x in angles]
        columns = self.unit.shape[0]
        return [_digits(self.coefficients, x, columns, self.warps) for x in angles]

    def product(self, phase: int, digits: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        """float32 [rows, columns] of a phase, and its unit."""
        found = _product(self.tables[phase], digits[0])
        for i, right in enumerate(digits[1:], start=1):
            other = _product(self.tables[phase], right)
            found = jnp.where(self.turns[phase][:, None] == i, other, found)
        return found, self.unit[None, :]


def turning(
    exact: Any, row: jax.Array, scale: float, heads: int, columns: int, warps: int, tile: tuple
) -> Turning:
    """Of an ExactOperand's references; `tile`: its tokens, and of each phase that of each row."""
    tokens, places = tile
    found = [divide(place, PERIOD) for place in places]
    coefficients: Any
    if columns > MANY:
        coefficients, unit = _coefficients_of_many(exact, row, heads, columns)
    else:
        coefficients, unit = _coefficients(exact, row, heads, columns, warps)
    return Turning(
        exact.phases,
        [_table(exact.phases, token) for _, token in found],
        [turn for turn, _ in found],
        tokens // PERIOD,
        coefficients,
        unit * scale,
        warps,
    )


def _pairs(phases: Any) -> tuple[jax.Array, int, jax.Array | None]:
    """Numbers of the pairs, padded; how many there are, and which, if not all."""
    count = phases.fine.shape[1] // 2
    pair = jnp.arange(max(MIN_COLUMNS // 2, power_of_two(count)))
    return pair, count, None if count == pair.shape[0] else pair < count


def _load(ref: Any, place: tuple, inside: jax.Array | None) -> jax.Array:
    if inside is None:
        return triton.load(ref.at[place])
    return triton.load(ref.at[place], mask=inside, other=jnp.zeros((), ref.dtype))


def _table(phases: Any, token: jax.Array) -> jax.Array:
    """int8 [rows, 2 * pairs] of these tokens of a turn."""
    pair, count, inside = _pairs(phases)
    column = jnp.arange(2 * pair.shape[0])
    if inside is not None:
        shape = token.shape[0], column.shape[0]
        inside = jnp.broadcast_to((column < 2 * count)[None, :], shape)
    return _load(phases.within, (token[:, None], column[None, :]), inside)


def _channels(phases: Any) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The two channels of each pair, and which pairs there are, if not all."""
    pair, count, inside = _pairs(phases)
    half = phases.rotary // 2
    if half == count:
        return pair, pair + count, inside
    first = jnp.where(pair < half, pair, pair + half)
    return first, jnp.where(pair < half, pair + half, pair + count), inside


def _coefficients_of_many(
    exact: Any, row: jax.Array, heads: int, columns: int
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """`_coefficients` as two arrays [pairs, columns]."""
    first, second, inside = _channels(exact.phases)
    head = jnp.arange(columns)[None, :]
    there = jnp.broadcast_to(head < heads, (first.shape[0], columns))
    if inside is not None:
        there = there & inside[:, None]

    def load(ref: Any, channel: jax.Array, *place: Any) -> jax.Array:
        at = tuple(jnp.broadcast_to(x, there.shape) for x in (*place, channel[:, None]))
        return triton.load(ref.at[at], mask=there, other=jnp.zeros((), ref.dtype))

    m1, m2 = (load(exact.key_mean, c, row).astype(jnp.float32) for c in (first, second))
    q1, q2 = (load(exact.query, c, head).astype(jnp.float32) for c in (first, second))
    a, b = q1 * m1 + q2 * m2, q2 * m1 - q1 * m2
    size = lax.bitcast_convert_type(jnp.abs(a) + jnp.abs(b), jnp.int32)
    largest = lax.bitcast_convert_type(size.max(axis=0), jnp.float32)
    largest = jnp.where(largest < jnp.inf, jnp.maximum(largest, 1e-30), jnp.nan)
    factor = (LIMIT * STEPS / largest)[None, :]
    return (a * factor, b * factor), largest / (LIMIT * STEPS)


def _coefficients(
    exact: Any, row: jax.Array, heads: int, columns: int, warps: int
) -> tuple[list[tuple], jax.Array]:
    """(A, B) of each head as numbers up to LIMIT once they are turned, and the unit [columns]."""
    first, second, inside = _channels(exact.phases)
    m1, m2 = (_load(exact.key_mean, (row, c), inside).astype(jnp.float32) for c in (first, second))
    found, unit = [], jnp.zeros((columns,), jnp.float32)
    for head in range(heads):
        q1, q2 = (
            _load(exact.query, (head, c), inside).astype(jnp.float32) for c in (first, second)
        )
        a, b = q1 * m1 + q2 * m2, q2 * m1 - q1 * m2
        # as integers, of which that of NaN is the largest: a maximum of floats passes it over
        size = lax.bitcast_convert_type(jnp.abs(a) + jnp.abs(b), jnp.int32)
        largest = lax.bitcast_convert_type(size.max(), jnp.float32)
        largest = jnp.where(largest < jnp.inf, jnp.maximum(largest, 1e-30), jnp.nan)
        factor = LIMIT * STEPS / largest
        found.append(tuple(_of_threads(x * factor, warps) for x in (a, b)))
        unit = jnp.where(jnp.arange(columns) == head, largest / (LIMIT * STEPS), unit)
    return found, unit


def _angles(phases: Any, turn: jax.Array) -> list[jax.Array]:
    """float32 [pairs]: cosines and sines of a turn's coarse angle and of its fine one."""
    pair, count, inside = _pairs(phases)
    coarse = jnp.minimum(lax.shift_right_logical(turn, 6), phases.coarse.shape[0] - 1)
    rows = (phases.coarse, coarse), (phases.fine, turn & (PERIOD - 1))
    return [_load(ref, (at, column), inside) for ref, at in rows for column in (pair, pair + count)]


def _of_threads(x: jax.Array, warps: int) -> tuple[jax.Array, ...]:
    """Elements of even and of odd places, where a thread has two neighbours."""
    if x.shape[0] < 2 * triton.LANES * warps:
        return (x,)
    return tuple(jnp.unstack(x.reshape(-1, 2), axis=-1))


def _digits(
    coefficients: list[tuple], angles: list[jax.Array], columns: int, warps: int
) -> jax.Array:
    """int8 [2 * pairs, 2 * columns]: high and low digits of A and B, turned back.

    The four bytes of a thread's pairs are put side by side last, so that they are written to shared
    memory as a word.
    """
    c1, s1, c2, s2 = angles
    cos, sin = triton.fma(c1, c2, -(s1 * s2)), triton.fma(c1, s2, s1 * c2)
    forth = _of_threads(cos, warps), _of_threads(sin, warps), _of_threads(-sin, warps)
    rows: list[list[jax.Array]] = [[] for _ in range(2 * len(forth[0]))]
    for a, b in coefficients:
        for i, (cos, sin, back) in enumerate(zip(*forth, strict=True)):
            # the bits of MAGIC itself are cut off by the conversion to a byte
            magic = jnp.full_like(a[i], MAGIC + 128.0)
            x = triton.fma(a[i], cos, triton.fma(b[i], sin, magic))
            y = triton.fma(b[i], cos, triton.fma(a[i], back, magic))
            for row, turned in ((rows[2 * i], x), (rows[2 * i + 1], y)):
                bits = lax.bitcast_convert_type(turned, jnp.int32)
                row += [(bits >> 8).astype(jnp.int8), (bits ^ 128).astype(jnp.int8)]
    for row in rows:
        row += [jnp.zeros_like(row[0])] * (2 * columns - len(row))
    right = _last_axis([_last_axis(row) for row in rows])
    return right.transpose(0, 2, 1).reshape(-1, 2 * columns)


def _digits_of_many(a: jax.Array, b: jax.Array, angles: list[jax.Array]) -> jax.Array:
    """`_digits` of coefficients [pairs, columns]."""
    c1, s1, c2, s2 = angles
    cos, sin = (
        jnp.broadcast_to(x[:, None], a.shape)
        for x in (triton.fma(c1, c2, -(s1 * s2)), triton.fma(c1, s2, s1 * c2))
    )
    magic = jnp.full_like(a, MAGIC + 128.0)
    rows = []
    for turned in (
        triton.fma(a, cos, triton.fma(b, sin, magic)),
        triton.fma(b, cos, triton.fma(-a, sin, magic)),
    ):
        bits = lax.bitcast_convert_type(turned, jnp.int32)
        both = jnp.stack([(bits >> 8).astype(jnp.int8), (bits ^ 128).astype(jnp.int8)], axis=-1)
        rows.append(both.reshape(a.shape[0], -1))
    right = jnp.stack(rows, axis=-1)
    return right.transpose(0, 2, 1).reshape(2 * a.shape[0], -1)


def _last_axis(parts: list[jax.Array]) -> jax.Array:
    """`jnp.stack` of 2**n arrays along a new last axis, two at a time."""
    shape = *parts[0].shape, len(parts)
    while len(parts) > 1:
        half = len(parts) // 2
        pairs = zip(parts[:half], parts[half:], strict=True)
        parts = [jnp.stack(pair, axis=-1) for pair in pairs]
    return parts[0].reshape(shape)


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    """float32 [rows, columns]."""
    found = triton.dot(left, right, b_axis=0)
    high, low = jnp.unstack(found.reshape(found.shape[0], -1, 2), axis=-1)
    return (high * 256 + low).astype(jnp.float32)
