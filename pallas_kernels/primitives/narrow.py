"""Codes of 1 to 4 bits in rows of 4 or 8 bytes -> int8 operands, by byte look-ups.

Four lanes hold 16 neighbouring columns of an operand. A row of fewer bytes is spread over them,
several times, and each copy is brought to codes of its own by a shift: the halves of a word, and
where there are four copies the codes of a nibble (1, 2 bits) or the third bits of the two halves
of a row (3 bits) too. What is left of the look-ups is done one after another, as in `dequantize`.
A trellis in rows of 32 elements has a path of one word, of which each copy makes the subsets of its
own codes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.primitives import triton
from pallas_kernels.primitives.codebook import CodebookOperand
from pallas_kernels.primitives.dequantize import Fetch, PackedDecoder, beside, divide
from pallas_kernels.primitives.trellis import (
    LOWER_BITS,
    as_bytes,
    as_words,
    level_of,
    level_tables,
    own_word_assembly,
)

# Columns that the lanes of a row hold.
CELLS = 16


def narrow_decoder(codebook: CodebookOperand, length: int) -> "NarrowDecoder | None":
    """For rows of this many elements, or None if their bytes are not 4 or 8."""
    unit = codebook.widths[-1]
    if codebook.code == "trellis":
        return NarrowTrellisDecoder(codebook, length, 1, unit) if length == 32 else None
    served = (32, 64) if codebook.bits < 3 else (32,) if codebook.bits == 3 else (64,)
    if codebook.bits > 4 or length * unit not in served:
        return None
    return NarrowDecoder(codebook, length, 1, unit)


@dataclasses.dataclass(frozen=True)
class NarrowDecoder(PackedDecoder):
    """`PackedDecoder` of one page's rows of 4 or 8 bytes a look-up."""

    @property
    def cells(self) -> int:
        """Columns of one look-up: those of all copies."""
        return CELLS

    @property
    def copies(self) -> int:
        """Times that the bytes of a look-up are there."""
        return CELLS // self.bytes

    @property
    def variants(self) -> int:
        """Look-ups of one copy."""
        return 8 // self.unit // self.copies

    def elements(self, column: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(page, element on the packed axis, whether there is one) of each column."""
        rest, column = divide(column, self.cells)
        copy, byte = divide(column, self.bytes)
        half, low = divide(copy, self.copies // 2)
        word, place = divide(byte, 4)
        pair, odd = divide(place, 2)
        byte = 4 * word + 2 * half + pair
        variant = rest * (self.copies // 2) + low
        element = byte + self.bytes * (variant + 4 // self.unit * odd)
        return jnp.zeros_like(element), element, element >= 0

    def tables(self) -> dict[str, np.ndarray]:
        """Constant inputs of the kernel: the look-up table, and by how much words are shifted."""
        copy = np.arange(CELLS) // self.bytes
        half, low = np.divmod(copy, self.copies // 2)
        lowest = np.arange(CELLS) % 4 == 0  # a word's value is that of its lowest byte
        first = 0 if self.codebook.bits == 3 else self.codebook.bits
        found = super().tables()
        for i, width in enumerate((first, 1) if self.codebook.bits == 3 else (first,)):
            found[f"shift{i}"] = np.where(lowest, 16 * half + width * low, 0).astype(np.uint8)
        return found

    def prepare(self, refs: Any) -> dict[str, Any]:
        """Loads the table and the shifts into registers."""
        found: dict[str, Any] = {"table": super().prepare(refs)}
        for name in sorted(set(refs) - {"table"}):  # the same code in every process
            found[name] = triton.load(refs[name].at[jnp.arange(CELLS)[None, :]])
        return found

    def load(self, fetch: Fetch) -> list[jax.Array]:
        """The bytes of each plane."""
        widths = [self.length * width // 8 for width in self.codebook.widths]
        again = triton.loads_again()
        zero = [jnp.zeros(CELLS if again else width, jnp.int32) for width in widths]

        def byte(width: int) -> jax.Array:
            return divide(jnp.arange(CELLS), width)[1] if again else jnp.arange(width)

        return [fetch(i, zero[i], byte(width), None) for i, width in enumerate(widths)]

    def operands(self, tiles: Any, table: Any) -> list[tuple[int, jax.Array]]:
        """(weight, int8 [rows, columns]): level + centre = sum(weight * operand)."""
        moved = [_shifted(_spread(tile), table[f"shift{i}"]) for i, tile in enumerate(tiles)]
        return super().operands(moved, table["table"])

    def place(self, variant: int) -> tuple[int, int, int]:
        """(part, group, half) of a look-up, after the copies were shifted."""
        return 0, variant if self.codebook.bits == 3 else variant * (self.copies // 2), 0


class NarrowTrellisDecoder(NarrowDecoder):
    """The same of a trellis whose path is one word of a row: it is its own word before."""

    @property
    def centre(self) -> int:
        """Levels are what they are."""
        return 0

    def tables(self) -> dict[str, np.ndarray]:
        """Constant inputs: look-up tables; of each copy the part of the path, shifts of planes."""
        copy = np.arange(CELLS) // self.bytes
        half, part = np.divmod(copy, self.copies // 2)
        lowest = np.arange(CELLS) % 4 == 0  # a word's value is that of its lowest byte
        words = {
            "part": part, "other": 1 - part, "shift2": 16 * half, "shift1": 16 * half + part,
        }  # fmt: skip
        found = {name: np.where(lowest, x, 0).astype(np.uint8) for name, x in words.items()}
        return {"table": level_tables(self.codebook)[0]} | found

    def operands(self, tiles: Any, table: Any) -> list[tuple[int, jax.Array]]:
        """(weight, int8 [rows, columns]): level = sum(weight * operand)."""
        *level_bits, path = (_spread(tile) for tile in tiles)
        words = [_subsets(path, *(table[name] for name in ("part", "other", "shift2")))]
        for width, tile in zip(self.codebook.widths[:-1], level_bits, strict=True):
            words.append(_shifted(tile, table[f"shift{width}"]))
        entries = [jnp.broadcast_to(word, path.shape) for word in table["table"]]
        return [
            (weight, beside([
                level_of(self.codebook, words, (0, variant, 0), entries, which)
                for variant in range(self.variants)
            ]))
            for which, weight in enumerate(level_tables(self.codebook)[1])
        ]  # fmt: skip


def _spread(tile: jax.Array) -> jax.Array:
    """[rows, bytes] -> [rows, CELLS], as often as it takes."""
    rows, width = tile.shape
    if width == CELLS:
        return tile
    copies = CELLS // width
    return lax.broadcast_in_dim(tile, (rows, copies, width), (0, 2)).reshape(rows, CELLS)


def _shifted(tile: jax.Array, shift: jax.Array) -> jax.Array:
    """Words of four columns, each shifted right as its lowest byte says."""
    if not triton.is_interpreted():
        shift = jnp.broadcast_to(shift, tile.shape)
        return triton.assembly("shr.b32 $0, $1, $2;", [tile, shift], "=r,r,r", 4, jnp.int8)
    return as_bytes(as_words(tile) >> shift[:, ::4].astype(jnp.uint32))


def _subsets(path: jax.Array, *moves: jax.Array) -> jax.Array:
    """Bytes [rows, CELLS] of a path of one word a row: 2 c1 + c0 of each copy's part, shifted."""
    if not triton.is_interpreted():
        wide = [jnp.broadcast_to(x, path.shape) for x in moves]
        return triton.assembly(
            own_word_assembly(), [path, *wide], "=r" + ",r" * (1 + len(wide)), 4, jnp.int8
        )
    word, low = as_words(path), jnp.uint32(LOWER_BITS)
    part, _, shift = (x[:, ::4].astype(jnp.uint32) for x in moves)
    before = word << 1 & jnp.uint32(0xFEFEFEFE)  # of the bits one place further down the path
    u1, u2, u3 = (before >> (32 - 8 * k) | word << (8 * k) for k in (1, 2, 3))
    c1 = word ^ u1 ^ u3
    return as_bytes(((u2 >> part & low) | (c1 >> part & low) << 1) >> shift)
