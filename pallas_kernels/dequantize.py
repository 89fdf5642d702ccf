"""Packed codes of 1 to 4 bits -> int8 matrix operands, four values per table look-up.

`prmt` takes four 4-bit selectors and answers with four bytes out of eight. So a word of packed codes is
brought, by one shift and one mask, into the form "one code per nibble", and each half of it then
becomes one register of the operand. The four values of a register are not neighbours on the packed
axis; since a contraction may run in any order, the other operand is arranged to match (`elements`).

Any class with the attributes `columns`, `pieces`, `centre` and the methods `elements`, `tables`,
`prepare`, `load`, `operands` of `PackedDecoder` can serve the loop; another code is another such class.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import triton
from pallas_kernels.codebook import Codebook

# The shortest contraction of an 8-bit matrix instruction (m16n8k32).
MIN_COLUMNS = 32
# Which bits of a nibble hold the code, in every nibble of a word (3 bits: those of its 2-bit plane).
CODE_BITS = {1: 0x11111111, 2: 0x33333333, 3: 0x33333333}
# A byte of the 4-bit tables is level + 64: never negative, so that its replicated sign is 0.
CENTRE = 64

# (plane, page of each column, byte of each column, which columns exist) -> bytes [rows, columns]
Fetch = Callable[[int, jax.Array, jax.Array, jax.Array | None], jax.Array]


def divide(column: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """column // n, column % n of non-negative integers.

    Without the tests for signs that jnp adds, so that Triton sees which bytes are neighbours.
    """
    divisor = jnp.full_like(column, n)
    return lax.div(column, divisor), lax.rem(column, divisor)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def lookup_assembly(bits: int, group: int, half: int, by_column: bool) -> str:
    """PTX: four codes of word $1 (third bits: the next operand) -> their four table bytes in $0.

    `group`: which of the code groups of a byte (4 bits: 1, 2 and 3 bits: 2, 1 bit: 4); `half`: which
    half of the word. With `by_column` the next operand holds a shift for this column, added to both:
    at 3 bits its bit 0 moves the third bits alone. Then four copies of each table word.
    """
    names = ["x"] + ["z"] * (bits == 3) + ["k"] * by_column
    copies = 1 + len(names)
    tables = [f"t{i}" for i in range(table_words(bits))]
    lines = [f".reg .b32 y, k2, x, z, k, {', '.join(tables)};"]
    lines += [f"mov.b32 {name}, ${1 + i};" for i, name in enumerate(names)]
    lines += [f"mov.b32 {name}, ${copies + 4 * i};" for i, name in enumerate(tables)]
    if by_column:
        lines.append("and.b32 k, k, 31;")
    if bits == 3:
        lines += ["shr.b32 z, z, k;"] * by_column
        lines += ["shl.b32 z, z, 2;"] * (group == 0) + ["and.b32 k2, k, 18;"] * by_column
        lines += ["shr.b32 x, x, k2;"] * by_column + ["and.b32 z, z, 0x44444444;"]
    else:
        lines += ["shr.b32 x, x, k;"] * by_column
    lines += [f"shr.b32 x, x, {group * bits_of_group(bits)};"] * (group > 0)
    if bits == 3:
        lines.append(f"lop3.b32 x, x, {CODE_BITS[bits]:#x}, z, 0xea;")  # (x & mask) | z
    elif bits < 3:
        lines.append(f"and.b32 x, x, {CODE_BITS[bits]:#x};")
    else:
        lines.append("xor.b32 y, x, 0x88888888;")
    lines += ["shr.b32 x, x, 16;"] * half + ["shr.b32 y, y, 16;"] * (half and bits == 4)
    if (
        bits == 4
    ):  # selector bit 3 asks for the sign, 0: one table answers, the other one keeps silent
        lines += ["prmt.b32 x, t0, t1, x;", "prmt.b32 y, t2, t3, y;", "or.b32 $0, x, y;"]
    else:
        lines.append(f"prmt.b32 $0, t0, {tables[-1]}, x;")
    return "{ " + " ".join(lines) + " }"


def lookup_words(
    x: jax.Array,
    z: jax.Array | None,
    k: jax.Array | None,
    bits: int,
    group: int,
    half: int,
) -> list[jax.Array]:
    """The same on uint32 words in jnp: the four codes that the table is asked for."""
    if k is not None:
        k = k & 31
    if bits == 3:
        assert z is not None
        z = z if k is None else z >> k
        k = None if k is None else k & 18
        z = ((z << 2) if group == 0 else z) & 0x44444444
    x = x if k is None else x >> k
    x = x >> (group * bits_of_group(bits))
    if bits < 4:
        x = x & CODE_BITS[bits]
    x = x if z is None else x | z
    x = x >> (16 * half)
    return [(x >> (4 * i)) & 15 for i in range(4)]


def bits_of_group(bits: int) -> int:
    """Width of the first plane: how far the next group of codes lies from the nibble's start."""
    return 1 if bits == 1 else 2 if bits < 4 else 4


def table_words(bits: int) -> int:
    """32-bit words of the look-up table."""
    return {1: 1, 2: 1, 3: 2, 4: 4}[bits]


@dataclasses.dataclass(frozen=True)
class PackedDecoder:
    """Tiles of codes packed along their columns: `length` elements a page, `pages` pages side by side.

    Where the bytes of all pages are fewer than the shortest contraction, they are read several times
    over and each copy takes another of the `variants` (group, half), by a shift that hangs on the column.
    """

    codebook: Codebook
    length: int
    pages: int

    @property
    def bytes(self) -> int:
        """Bytes of the first plane in one row of a page."""
        return self.length * self.codebook.widths[0] // 8

    @property
    def copies(self) -> int:
        row = self.bytes * self.pages
        return max(1, MIN_COLUMNS // row) if row == power_of_two(row) else 1

    @property
    def columns(self) -> int:
        return max(MIN_COLUMNS, power_of_two(self.bytes * self.pages))

    @property
    def variants(self) -> int:
        return 8 // self.codebook.widths[0]

    @property
    def pieces(self) -> int:
        return self.variants // self.copies

    @property
    def centre(self) -> int:
        return CENTRE if self.codebook.bits == 4 else 0

    @property
    def by_column(self) -> bool:
        return self.copies > 1 or self.codebook.bits == 3

    def elements(self, piece: int, column: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(page, element on the packed axis, whether there is one) of each column of a piece."""
        row = self.bytes * self.pages
        if self.copies > 1:
            copy, column = divide(column, row)
            group, half = divide(piece * self.copies + copy, 2)
        else:
            group, half = jnp.full_like(column, piece // 2), jnp.full_like(column, piece % 2)
        word, place = divide(column, 4)
        pair, odd = divide(place, 2)
        byte = 4 * word + 2 * half + pair
        page, within = divide(byte, self.bytes)
        return page, within + self.bytes * (group + self.variants // 2 * odd), byte < row

    def tables(self) -> dict[str, np.ndarray]:
        """Constant inputs of the kernel: the look-up table as int32 words, shifts uint8 by column."""
        levels = np.array(self.codebook.levels) + self.centre
        levels = np.resize(levels, 4 * table_words(self.codebook.bits)).astype(np.int8)
        found = {"table": levels.view(np.int32)}
        if self.by_column:
            found["shift"] = self._shifts()
        return found

    def _shifts(self) -> np.ndarray:
        column = np.arange(self.columns)[None, :]
        row = self.bytes * self.pages
        variant = np.arange(self.pieces)[:, None] * self.copies + column // row
        move = variant // 2 * bits_of_group(self.codebook.bits) + 16 * (variant % 2)
        move = move * (self.copies > 1)
        if self.codebook.bits == 3:  # a byte of the third bits serves two bytes of the first plane
            move = move + column % row % self.bytes // (self.bytes // 2)
        return np.broadcast_to(move, (self.pieces, self.columns)).astype(np.uint8)

    def prepare(self, refs: dict[str, jax.Array]) -> dict[str, list[jax.Array]]:
        """Loads the tables into registers: as loaded [1, 1] tensors they stay there."""
        words = range(table_words(self.codebook.bits))
        tables = [triton.load(refs["table"].at[jnp.full((1, 1), i)]) for i in words]
        if not self.by_column:
            return {"table": tables}
        column = jnp.arange(self.columns)[None, :]
        pieces = [jnp.full((1, 1), piece) for piece in range(self.pieces)]
        return {
            "table": tables,
            "shift": [triton.load(refs["shift"].at[piece, column]) for piece in pieces],
        }

    def load(self, fetch: Fetch) -> list[jax.Array]:
        """The code bytes of a tile, [rows, columns] of each plane."""
        row = self.bytes * self.pages
        column = jnp.arange(self.columns)
        mask = None
        if row != power_of_two(row):
            mask = column < row
        elif row < self.columns:
            column = divide(column, row)[1]
        page, byte = divide(column, self.bytes)
        tiles = [fetch(0, page, byte, mask)]
        if self.codebook.bits == 3:
            tiles.append(fetch(1, page, divide(byte, self.bytes // 2)[1], mask))
        return tiles

    def operands(
        self,
        tiles: list[jax.Array],
        piece: int,
        prepared: dict[str, list[jax.Array]],
        interpret: bool,
    ) -> list[tuple[int, jax.Array]]:
        """int8 operands [rows, columns] with their weights: level + centre = sum(weight * operand)."""
        bits = self.codebook.bits
        group, half = (0, 0) if self.copies > 1 else (piece // 2, piece % 2)
        arguments = list(tiles)
        if self.by_column:
            arguments.append(jnp.broadcast_to(prepared["shift"][piece], tiles[0].shape))
        if interpret:
            return [(1, self._lookup(arguments, group, half))]
        arguments += [jnp.broadcast_to(t, tiles[0].shape) for t in prepared["table"]]
        constraints = "=r" + ",r" * (len(tiles) + self.by_column + 4 * len(prepared["table"]))
        text = lookup_assembly(bits, group, half, self.by_column)
        return [(1, triton.assembly(text, arguments, constraints, 4, jnp.int8))]

    def _lookup(self, arguments: list[jax.Array], group: int, half: int) -> jax.Array:
        """Stand-in for the assembly: words of four columns, then the table by comparison."""
        rows, columns = arguments[0].shape
        split = [a.reshape(rows, columns // 4, 4).astype(jnp.uint32) for a in arguments]
        words = [a[..., 0] | a[..., 1] << 8 | a[..., 2] << 16 | a[..., 3] << 24 for a in split]
        x, rest = words[0], words[1:]
        z = rest.pop(0) if self.codebook.bits == 3 else None
        k = rest.pop(0) if self.by_column else None
        codes = jnp.stack(lookup_words(x, z, k, self.codebook.bits, group, half), axis=-1)
        table = self.tables()["table"].view(np.uint32)
        word = jnp.uint32(table[0])
        for i in range(1, len(table)):
            word = jnp.where(codes >> 2 == i, jnp.uint32(table[i]), word)
        byte = (word >> (8 * (codes & 3))) & 255
        return lax.bitcast_convert_type(byte.astype(jnp.uint8), jnp.int8).reshape(rows, columns)
