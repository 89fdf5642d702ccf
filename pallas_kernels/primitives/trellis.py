"""Trellis codes -> int8 matrix operands, by the look-ups of scalar codes.

A code of R bits is a path bit u, in a plane of its own, and R - 1 level bits w. With u[t - k] the
bit k steps earlier on the path of a vector, 0 before its start, it stands for level number

    4 w + 2 c1 + c0,     c0 = u[t-2],     c1 = u[t] ^ u[t-1] ^ u[t-3].

So the whole state is three earlier bits of the same plane, all elements decode side by side, and
c1, c0 of 16 elements are made a word at a time: put beside each other they are a 2-bit plane. From
there on a trellis of R bits is a scalar code of R + 1 bits. At 4 bits a look-up asks four tables,
and levels of more than a byte are two digits in base 128.

The path runs along the channels. Keys have them in their columns: of a word of path bits the
word before it holds what is earlier, so the plane is loaded once more, one word back. Values
have them in their rows: the plane is loaded three times more, 1 to 3 rows back.
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
from pallas_kernels.primitives.dequantize import (
    Fetch,
    PackedDecoder,
    beside,
    divide,
    lookup_assembly,
    lookup_codes,
)

# In a 2-bit plane, the lower bit of each field; in nibbles, the lower two bits of each.
LOWER_BITS = 0x55555555
LOWER_HALVES = 0x33333333
# A truth table of lop3: the bits of b where a has ones, those of c elsewhere.
SELECT = 0xCA
DIGIT = 128
# PTX: of the bytes in $1, and those before them in a: c0 in c and c1 in d, at the places of $1.
EARLIER = (
    "prmt.b32 b, a, $1, 0x6543;",
    "prmt.b32 c, a, $1, 0x5432;",
    "prmt.b32 d, a, $1, 0x4321;",
    "lop3.b32 d, $1, b, d, 0x96;",
)


def code_number(codebook: CodebookOperand, field: Callable[[int, int], jax.Array]) -> jax.Array:
    """Which of the codebook's levels (int32) codes stand for, from the fields of their planes.

    `field(plane, back)`: int32 fields of the elements `back` steps earlier on a path, 0 before its
    start; a scalar code asks for 0 steps only.
    """
    if codebook.code == "scalar":
        number, done, planes = jnp.int32(0), 0, len(codebook.widths)
    else:
        planes = len(codebook.widths) - 1
        u0, u1, u2, u3 = (field(planes, back) for back in range(4))
        number, done = 2 * (u0 ^ u1 ^ u3) + u2, 2
    for plane in range(planes):
        number = number | field(plane, 0) << done
        done += codebook.widths[plane]
    return number


def subset_assembly(part: int | None, rows: bool) -> str:
    """PTX: 2 c1 + c0 of every other path bit of a word, from bit `part` on, as 2-bit fields in $0.

    The word is in $1. Where the path runs along the rows, $2, $3, $4 are the words one to three
    rows back. Else $2 is the word before, of the same row, and $3 has ones in the bytes of a row's
    first word, before which stands the row's last one, of bits one place further down the path.
    Without a `part` the next operand is the part, and the one after it 1 - part.
    """
    lines = [".reg .b32 a, b, c, d;"]
    shifts = 5 if rows else 4
    if rows:
        lines += ["mov.b32 c, $3;", "lop3.b32 d, $1, $2, $4, 0x96;"]
    else:
        lines += [
            "shl.b32 a, $2, 1;",
            "and.b32 a, a, 0xfefefefe;",
            f"lop3.b32 a, $3, a, $2, {SELECT:#x};",
            *EARLIER,
        ]
    if part is None:
        lines += [f"shr.b32 c, c, ${shifts};", f"shl.b32 d, d, ${shifts + 1};"]
    else:
        lines.append("shr.b32 c, c, 1;" if part else "shl.b32 d, d, 1;")
    lines.append(f"lop3.b32 $0, {LOWER_BITS:#x}, c, d, {SELECT:#x};")
    return "{ " + " ".join(lines) + " }"


def own_word_assembly() -> str:
    """`subset_assembly` of a row that is one word, in $1, and so the word before it, too.

    $2 is the part, $3 is 1 - part, and $4 by how much the answer is shifted right.
    """
    lines = [
        ".reg .b32 a, b, c, d;",
        "shl.b32 a, $1, 1;",
        "and.b32 a, a, 0xfefefefe;",
        *EARLIER,
        "shr.b32 c, c, $2;",
        "shl.b32 d, d, $3;",
        f"lop3.b32 c, {LOWER_BITS:#x}, c, d, {SELECT:#x};",
        "shr.b32 $0, c, $4;",
    ]
    return "{ " + " ".join(lines) + " }"


def _nibbles(group: int) -> list[str]:
    """PTX: codes of 2 + 2 bits as nibbles in x, of low bits in $1 and high bits in $2."""
    if group:
        return ["shr.b32 x, $1, 2;", f"lop3.b32 x, {LOWER_HALVES:#x}, x, $2, {SELECT:#x};"]
    return ["shl.b32 x, $2, 2;", f"lop3.b32 x, {LOWER_HALVES:#x}, $1, x, {SELECT:#x};"]


def quarter_tables_assembly(part: int, group: int, half: int) -> str:
    """PTX: four codes of 2 + 2 + 1 bits -> a byte for each of them.

    $1 and $2 as of `half_table_assembly`; $3 has the highest bits, of which this word owns every
    other one, from bit `part` on. Then four copies of each of the eight words of the table.
    """
    table = [f"${4 + 4 * i}" for i in range(8)]
    lines = [".reg .b32 x, y, m, n, a, b, c, d;", *_nibbles(group)]
    if half:
        lines.append("shr.b32 x, x, 16;")
    # bytes of ones where a code is of the second of two tables; of the second two
    lines += ["shr.b32 y, x, 3;", "and.b32 y, y, 0x11111111;", "prmt.b32 m, 0xff00, 0, y;"]
    lines += [f"shr.b32 y, $3, {part + 2 * group + 16 * half};", "and.b32 y, y, 0x11111111;"]
    lines += ["prmt.b32 n, 0xff00, 0, y;", "and.b32 x, x, 0x77777777;"]
    for i, name in enumerate("abcd"):
        lines.append(f"prmt.b32 {name}, {table[2 * i]}, {table[2 * i + 1]}, x;")
    lines += [f"lop3.b32 a, m, b, a, {SELECT:#x};", f"lop3.b32 c, m, d, c, {SELECT:#x};"]
    lines.append(f"lop3.b32 $0, n, c, a, {SELECT:#x};")
    return "{ " + " ".join(lines) + " }"


def quarter_table_codes(
    low: jax.Array, high: jax.Array, highest: jax.Array, part: int, group: int, half: int
) -> list[jax.Array]:
    """The four codes that `quarter_tables_assembly` asks its tables for."""
    found = half_table_codes(low, high, group, half)
    bits = highest >> (part + 2 * group + 16 * half)
    return [code | (bits >> (4 * i) & 1) << 4 for i, code in enumerate(found)]


def level_tables(codebook: CodebookOperand) -> tuple[np.ndarray, tuple[int, ...]]:
    """Words of its look-up tables, one after another, and the weight of what each answers."""
    levels = np.array(codebook.levels)
    if codebook.bits == 3:  # a lower and an upper half
        levels[8:] += 1  # what the other half answers comes off
        return levels.astype(np.int8).view(np.int32), (1, 1)
    if levels.min() >= -DIGIT and levels.max() < DIGIT:
        return levels.astype(np.int8).view(np.int32), (1,)
    high = (levels + DIGIT // 2) >> 7
    digits = np.concatenate([high, levels - high * DIGIT])
    return digits.astype(np.int8).view(np.int32), (DIGIT, 1)


def level_of(
    codebook: CodebookOperand,
    words: list[jax.Array],
    place: tuple[int, int, int],
    table: list[jax.Array],
    which: int,
) -> jax.Array:
    """Bytes of table number `which`: codes whose bits are in `words`, at (part, group, half).

    `words`, bytes [rows, cells]: 2 c1 + c0, then the level bits, plane by plane. `table`: all words
    of all tables, each in the shape of `words`.
    """
    bits, (part, group, half) = codebook.bits, place
    if triton.is_interpreted():
        rows, columns = words[0].shape
        values, weights = level_tables(codebook)
        of_codes = [as_words(x) for x in words]
        if bits == 4:
            low, high, highest = of_codes
            codes = quarter_table_codes(low, high, highest, part, group, half)
        elif bits == 3:
            codes = half_table_codes(of_codes[0], of_codes[1], group, half)
        else:
            z = of_codes[1] if bits == 2 else None
            codes = lookup_codes(of_codes[0], z, bits + 1, part, group, half)
        entry = jnp.stack(codes, axis=-1).reshape(rows, columns)
        own = values.view(np.int8)
        first = which * (len(own) // len(weights))
        if bits == 3:
            own = np.where(np.arange(16) // 8 == which, own, which - 1)
        elif bits == 4:
            own = own[first : first + 32]
        level = jnp.zeros(entry.shape, jnp.int32)
        for i, value in enumerate(own.tolist()):
            level = jnp.where(entry == i, value, level)
        return level.astype(jnp.int8)
    count = len(table) // len(level_tables(codebook)[1])
    table = table[which * count : (which + 1) * count]
    if bits == 4:
        text = quarter_tables_assembly(part, group, half)
    elif bits == 3:
        text = half_table_assembly(group, half, which)
    else:
        text = lookup_assembly(bits + 1, part, group, half)
    constraints = "=r" + ",r" * (len(words) + 4 * len(table))
    return triton.assembly(text, [*words, *table], constraints, 4, jnp.int8)


def half_table_assembly(group: int, half: int, upper: int) -> str:
    """PTX: four codes of 2 + 2 bits, low bits in $1, high bits in $2 -> what a half table answers.

    The tables of the lower levels have negative bytes only, the others none, so that to a code of
    the other half, selector bit 3, they answer with -1 and with 0: signs replicated.
    """
    lines = [".reg .b32 x;", *_nibbles(group)]
    if upper:
        lines.append("xor.b32 x, x, 0x88888888;")
    if half:
        lines.append("shr.b32 x, x, 16;")
    lines.append("prmt.b32 $0, $3, $7, x;")
    return "{ " + " ".join(lines) + " }"


@dataclasses.dataclass(frozen=True)
class TrellisDecoder(PackedDecoder):
    """`PackedDecoder` of a trellis; `rows`: the path runs along the rows, else the columns.

    `unit` is 1, the width of the path's plane, or 2, where that has a multiple of 4 bytes: each of
    them then fills two columns, and makes other subsets in each. At 3 bits level = the sum of two
    operands: each has half of the levels, so that a look-up of eight bytes does, and -1 or 0 for
    the others.
    """

    rows: bool

    @property
    def centre(self) -> int:
        """Levels are what they are."""
        return 0

    @property
    def parts(self) -> int:
        """Look-ups that share out the bytes of a 2-bit plane."""
        return 2 // self.unit

    def tables(self) -> dict[str, np.ndarray]:
        """Constant inputs of the kernel: look-up tables, int32 words; masks and shifts of words."""
        found: dict[str, np.ndarray] = {"table": level_tables(self.codebook)[0]}
        part, byte = np.divmod(np.arange(self.cells), self.length // 8)
        if not self.rows:
            found["first"] = np.where(np.repeat(byte[::4] == 0, 4), 255, 0).astype(np.uint8)
        if self.unit == 2:
            lowest = np.arange(self.cells) % 4 == 0  # a word's value is that of its lowest byte
            found["part"] = np.where(lowest, part % 2, 0).astype(np.uint8)
            found["other"] = np.where(lowest, 1 - part % 2, 0).astype(np.uint8)
        return found

    def prepare(self, refs: Any) -> dict[str, Any]:
        """Loads tables, masks and shifts into registers."""
        found: dict[str, Any] = {"table": super().prepare(refs)}
        for name in sorted(set(refs) - {"table"}):  # the same code in every process
            found[name] = triton.load(refs[name].at[jnp.arange(self.cells)[None, :]])
        return found

    def load(self, fetch: Fetch) -> tuple[list[jax.Array], list[jax.Array]]:
        """Bytes [rows, cells]: of the path and earlier on it; of the level bits."""
        column = jnp.arange(self.cells)
        mask = None if self.cells == self.bytes * self.pages else column < self.bytes * self.pages
        path, width = len(self.codebook.widths) - 1, self.length // 8
        narrow = jnp.arange(self.cells // self.unit)  # of a plane of single bits
        page, own = divide(narrow, width)
        if self.unit == 2 and triton.loads_again():
            narrow, page, own = column, divide(column, self.bytes)[0], divide(column, width)[1]
        if self.rows:
            tiles = [fetch(path, page, own, mask, back) for back in range(4)]
        else:
            # of every column: the last word may be short of bytes, the one before it is not
            before = divide(narrow + (width - 4), width)[1]
            tiles = [fetch(path, page, own, mask), fetch(path, page, before, None)]
        if self.codebook.bits == 1:
            return tiles, []
        if self.codebook.bits == 2:
            return tiles, [fetch(0, page, own, mask)]
        highest = [fetch(1, page, own, mask)] if self.codebook.bits == 4 else []
        page, byte = divide(column, self.bytes)
        parts = range(self.parts)
        return tiles, [fetch(0, page, byte + part * self.bytes, mask) for part in parts] + highest

    def operands(self, tiles: Any, table: Any) -> list[tuple[int, jax.Array]]:
        """(weight, int8 [rows, columns]): level = sum(weight * operand)."""
        path, level_bits = tiles
        if self.unit == 2:
            path = [self._twice(tile) for tile in path]
        shape = path[0].shape
        wide = {name: jnp.broadcast_to(x, shape) for name, x in table.items() if name != "table"}
        words = [jnp.broadcast_to(word, shape) for word in table["table"]]
        subsets = [self._subsets(path, wide, part) for part in range(self.parts)]
        if self.codebook.bits in (2, 4) and self.unit == 2:
            *level_bits, last = level_bits
            level_bits = [*level_bits, self._moved(self._twice(last), wide["part"])]
        return [
            (weight, beside([
                self._level(subsets, level_bits, variant, words, which)
                for variant in range(self.variants)
            ]))
            for which, weight in enumerate(level_tables(self.codebook)[1])
        ]  # fmt: skip

    def _subsets(self, path: list[jax.Array], wide: dict[str, jax.Array], part: int) -> jax.Array:
        """Bytes [rows, cells]: 2 c1 + c0 as a plane of 2 bits, its bytes of this part."""
        if triton.is_interpreted():
            if not self.rows:
                path = [path[0], *_earlier(path[0], path[1], wide["first"])]
            c0, c1 = path[2], path[0] ^ path[1] ^ path[3]
            low = jnp.uint8(LOWER_BITS & 255)
            move = jnp.uint8(part)
            if self.unit == 2:
                move = jnp.repeat(wide["part"][:, ::4], 4, axis=1)
            return ((c0 >> move) & low) | ((c1 >> move) & low) << 1
        arguments = path if self.rows else [*path, wide["first"]]
        if self.unit == 2:
            arguments = [*arguments, wide["part"], wide["other"]]
        text = subset_assembly(part if self.unit == 1 else None, self.rows)
        return triton.assembly(text, arguments, "=r" + ",r" * len(arguments), 4, jnp.int8)

    def _twice(self, plane: jax.Array) -> jax.Array:
        """[rows, cells / 2] -> [rows, cells]: the bytes of each page twice, one after the other."""
        if triton.loads_again():
            return plane
        rows, width = plane.shape[0], self.length // 8
        if self.pages == 1:
            return lax.broadcast_in_dim(plane, (rows, 2, width), (0, 2)).reshape(rows, self.cells)
        split = plane.reshape(rows, self.pages, width)
        wide = lax.broadcast_in_dim(split, (rows, self.pages, 2, width), (0, 1, 3))
        return wide.reshape(rows, self.cells)

    def _moved(self, plane: jax.Array, part: jax.Array) -> jax.Array:
        """The words of a 1-bit plane, the bits of a word's part in its even places."""
        if triton.is_interpreted():
            return plane >> jnp.repeat(part[:, ::4], 4, axis=1)
        return triton.assembly("shr.b32 $0, $1, $2;", [plane, part], "=r,r,r", 4, jnp.int8)

    def _level(
        self, subsets: list[jax.Array], level_bits: list[jax.Array], variant: int,
        table: list[jax.Array], which: int,
    ) -> jax.Array:  # fmt: skip
        """What one look-up answers, in table number `which`."""
        part, group = variant // 2 % self.parts, variant // 2 // self.parts
        words = [subsets[part], *level_bits]
        if self.codebook.bits > 2:  # a plane of 2 bits, in parts
            words = [subsets[part], level_bits[part], *level_bits[self.parts :]]
        return level_of(self.codebook, words, (part, group, variant % 2), table, which)


def as_bytes(words: jax.Array) -> jax.Array:
    """uint32 [rows, words] -> uint8 [rows, 4 * words], the lowest byte first."""
    split = [(words >> (8 * i)).astype(jnp.uint8) for i in range(4)]
    return jnp.stack(split, axis=-1).reshape(words.shape[0], -1)


def as_words(tile: jax.Array) -> jax.Array:
    """uint8 [rows, columns] -> uint32 [rows, columns / 4], the first byte lowest."""
    rows, columns = tile.shape
    x = tile.reshape(rows, columns // 4, 4).astype(jnp.uint32)
    return x[..., 0] | x[..., 1] << 8 | x[..., 2] << 16 | x[..., 3] << 24


def half_table_codes(low: jax.Array, high: jax.Array, group: int, half: int) -> list[jax.Array]:
    """The four codes that `half_table_assembly` asks its table for, before `upper`."""
    low, high = (low >> 2, high) if group else (low, high << 2)
    x = (low & LOWER_HALVES | high & ~jnp.uint32(LOWER_HALVES)) >> (16 * half)
    return [(x >> (4 * i)) & 15 for i in range(4)]


def _earlier(word: jax.Array, before: jax.Array, first: jax.Array) -> list[jax.Array]:
    """Path bytes one to three steps back, of a row's bytes and those of the word before each."""
    rows, columns = word.shape
    moved = jnp.where(first > 0, before << 1, before).reshape(rows, columns // 4, 4)
    both = jnp.concatenate([moved, word.reshape(rows, columns // 4, 4)], axis=-1)
    return [lax.slice_in_dim(both, 4 - k, 8 - k, axis=2).reshape(rows, columns) for k in (1, 2, 3)]
