"""Packed codes of 1 to 4 bits -> int8 matrix operands, four values per table look-up.

`prmt` takes four 4-bit selectors and answers with four bytes out of eight. So a word of packed
codes is brought, by one shift and one mask, into the form "one code per nibble", and each half of
it then becomes one register of the operand. The four values of a register are not neighbours on
the packed axis; since a contraction may run in any order, the other operand is arranged to match
(`elements`).

Any class with the attributes `columns`, `centre` and the methods `elements`, `tables`,
`prepare`, `load`, `operands` of `PackedDecoder` can serve the loop; another code is another such
class.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.primitives import triton
from pallas_kernels.primitives.codebook import CodebookOperand

# The shortest contraction of an 8-bit matrix instruction (m16n8k32).
MIN_COLUMNS = 32
# Which bits of every nibble hold the code (3 bits: those of its 2-bit plane).
CODE_BITS = {1: 0x11111111, 2: 0x33333333, 3: 0x33333333}
THIRD_BITS = 0x44444444
# A byte of the 4-bit tables is level + 64: never negative, so that its replicated sign is 0.
CENTRE = 64

# (plane, page of each column, byte of each column, which columns exist) -> bytes [rows, columns];
# of values also from how many rows back, 0 where there is none
Fetch = Callable[..., jax.Array]


def divide(column: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """column // n, column % n of non-negative integers.

    Without the tests for signs that jnp adds, so that Triton sees which bytes are neighbours.
    """
    divisor = jnp.full_like(column, n)
    return lax.div(column, divisor), lax.rem(column, divisor)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def lookup_assembly(bits: int, part: int, group: int, half: int) -> str:
    """PTX: four codes of the word in $1 -> their four table bytes in $0.

    `group`: which codes of a byte, `half`: which half of the word. At 3 bits $2 holds third bits,
    of which this word owns every other one, from bit `part` on. Then four copies of each table
    word.
    """
    words = 1 + (bits == 3)
    tables = [f"t{i}" for i in range(table_words(bits))]
    lines = [f".reg .b32 x, y, z, {', '.join(tables)};", "mov.b32 x, $1;"]
    lines += [f"mov.b32 {name}, ${words + 1 + 4 * i};" for i, name in enumerate(tables)]
    if group:
        lines.append(f"shr.b32 x, x, {group * group_width(bits)};")
    if bits == 3:
        move = third_bit_shift(part, group)
        lines += ["mov.b32 z, $2;", f"{'shl' if move < 0 else 'shr'}.b32 z, z, {abs(move)};"]
        lines += [f"and.b32 z, z, {THIRD_BITS:#x};"]
        lines += [f"lop3.b32 x, x, {CODE_BITS[bits]:#x}, z, 0xea;"]  # (x & mask) | z
    elif bits < 3:
        lines.append(f"and.b32 x, x, {CODE_BITS[bits]:#x};")
    else:
        lines.append("xor.b32 y, x, 0x88888888;")
    if half:
        lines += ["shr.b32 x, x, 16;"] + ["shr.b32 y, y, 16;"] * (bits == 4)
    if (
        bits == 4
    ):  # selector bit 3 asks for the sign, 0: one half table answers, the other is silent
        lines += ["prmt.b32 x, t0, t1, x;", "prmt.b32 y, t2, t3, y;", "add.u32 $0, x, y;"]
    else:
        lines.append(f"prmt.b32 $0, t0, {tables[-1]}, x;")
    return "{ " + " ".join(lines) + " }"


def lookup_codes(
    x: jax.Array, z: jax.Array | None, bits: int, part: int, group: int, half: int
) -> list[jax.Array]:
    """The same on uint32 words in jnp: the four codes that the table is asked for."""
    x = x >> (group * group_width(bits))
    if bits < 4:
        x = x & CODE_BITS[bits]
    if z is not None:
        move = third_bit_shift(part, group)
        x = x | (z << -move if move < 0 else z >> move) & THIRD_BITS
    x = x >> (16 * half)
    return [(x >> (4 * i)) & 15 for i in range(4)]


def group_width(bits: int) -> int:
    """Bits of the first plane: how far the next group of codes lies from the nibble's start."""
    return {1: 1, 2: 2, 3: 2, 4: 4}[bits]


def third_bit_shift(part: int, group: int) -> int:
    """How far right the third bits of a group move to reach bit 2 of their nibbles."""
    return part + 2 * group - 2


def table_words(bits: int) -> int:
    """32-bit words of the look-up table."""
    return {1: 1, 2: 1, 3: 2, 4: 4}[bits]


def beside(tiles: list[jax.Array]) -> jax.Array:
    """Concatenates 2**n tiles [rows, columns] along the columns, without leaving the registers."""
    while len(tiles) > 1:
        pairs = [jnp.stack(pair, axis=-1) for pair in zip(tiles[::2], tiles[1::2], strict=True)]
        rows, columns, _ = pairs[0].shape
        tiles = [pair.transpose(0, 2, 1).reshape(rows, 2 * columns) for pair in pairs]
    return tiles[0]


@dataclasses.dataclass(frozen=True)
class PackedDecoder:
    """Codes packed along their columns: `length` elements a page, `pages` pages side by side.

    A look-up turns one byte column into one column of values, `8 / width` times over: each
    `variant` is another group of codes, half of the words and part of the first plane, and all of
    them are set side by side. The parts follow from `unit`, a width of which the row of one
    look-up is made: that of the narrowest plane, or narrower where codes of different widths have
    to come in the same order.
    """

    codebook: CodebookOperand
    length: int
    pages: int
    unit: int

    @property
    def bytes(self) -> int:
        """Bytes of one look-up in one row of a page."""
        return self.length * self.unit // 8

    @property
    def variants(self) -> int:
        """Look-ups of one byte."""
        return 8 // self.unit

    @property
    def cells(self) -> int:
        """Columns of one look-up."""
        return power_of_two(self.bytes * self.pages)

    @property
    def columns(self) -> int:
        """Columns of the operand: all look-ups side by side."""
        return self.cells * self.variants

    @property
    def centre(self) -> int:
        """What the table's bytes have too much."""
        return CENTRE if self.codebook.bits == 4 else 0

    @property
    def parts(self) -> int:
        """Look-ups that share out the bytes of the first plane."""
        return self.codebook.widths[0] // self.unit

    def elements(self, column: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(page, element on the packed axis, whether there is one) of each column."""
        variant, column = divide(column, self.cells)
        variant, half = divide(variant, 2)
        word, place = divide(column, 4)
        pair, odd = divide(place, 2)
        cell = 4 * word + 2 * half + pair
        page, byte = divide(cell, self.bytes)
        element = byte + self.bytes * (variant + self.variants // 2 * odd)
        return page, element, cell < self.bytes * self.pages

    def tables(self) -> dict[str, np.ndarray]:
        """Constant input of the kernel: the look-up table, int32 words."""
        levels = np.array(self.codebook.levels) + self.centre
        levels = np.resize(levels, 4 * table_words(self.codebook.bits)).astype(np.int8)
        return {"table": levels.view(np.int32)}

    def prepare(self, refs: Any) -> Any:
        """Loads the table into registers: as loaded [1, 1] tensors its words stay there."""
        words = range(refs["table"].shape[0])
        return [triton.load(refs["table"].at[jnp.full((1, 1), i)]) for i in words]

    def load(self, fetch: Fetch) -> Any:
        """Code bytes [rows, cells]: the parts of the first plane, then the third bits."""
        column = jnp.arange(self.cells)
        mask = None if self.cells == self.bytes * self.pages else column < self.bytes * self.pages
        page, byte = divide(column, self.bytes)
        tiles = [fetch(0, page, byte + part * self.bytes, mask) for part in range(self.parts)]
        if self.codebook.bits == 3:
            tiles.append(fetch(1, page, byte, mask))
        return tiles

    def operands(self, tiles: Any, table: Any) -> list[tuple[int, jax.Array]]:
        """(weight, int8 [rows, columns]): level + centre = sum(weight * operand)."""
        found = [self._lookup(tiles, v, table) for v in range(self.variants)]
        return [(1, beside(found))]

    def place(self, variant: int) -> tuple[int, int, int]:
        """(part of the first plane, group of codes, half of the words) of a look-up."""
        return variant // 2 % self.parts, variant // 2 // self.parts, variant % 2

    def _lookup(self, tiles: list[jax.Array], variant: int, table: list[jax.Array]) -> jax.Array:
        bits = self.codebook.bits
        part, group, half = self.place(variant)
        words = [tiles[part], *tiles[len(tiles) - (bits == 3) :]]
        if triton.is_interpreted():
            return self._stand_in(words, part, group, half)
        arguments = words + [jnp.broadcast_to(t, tiles[0].shape) for t in table]
        constraints = "=r" + ",r" * (len(words) + 4 * len(table))
        text = lookup_assembly(bits, part, group, half)
        return triton.assembly(text, arguments, constraints, 4, jnp.int8)

    def _stand_in(self, tiles: list[jax.Array], part: int, group: int, half: int) -> jax.Array:
        """The assembly in jnp: words of four columns, then the table."""
        rows, columns = tiles[0].shape
        split = [a.reshape(rows, columns // 4, 4).astype(jnp.uint32) for a in tiles]
        words = [a[..., 0] | a[..., 1] << 8 | a[..., 2] << 16 | a[..., 3] << 24 for a in split]
        z = words[1] if len(words) > 1 else None
        codes = lookup_codes(words[0], z, self.codebook.bits, part, group, half)
        return self._levels(jnp.stack(codes, axis=-1)).reshape(rows, columns)

    def _levels(self, codes: jax.Array) -> jax.Array:
        table = self.tables()["table"].view(np.uint32)
        word = jnp.full_like(codes, table[0])
        for i in range(1, len(table)):
            word = jnp.where(codes >> 2 == i, jnp.uint32(table[i]), word)
        byte = (word >> (8 * (codes & 3))) & 255
        return lax.bitcast_convert_type(byte.astype(jnp.uint8), jnp.int8)
