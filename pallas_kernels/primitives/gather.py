"""Codes of any width, in any order -> int8 operands by a gather: right everywhere, fast nowhere.

Serves 5 to 8 bits, lengths that the packed look-up cannot cut into words, and
a group of value channels whose code order differs from that of the first group. Every element is
fetched as a byte of its own from each plane, and its level is read from a table in memory. A level
is two digits in base 128 where one signed byte cannot hold it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.primitives import triton
from pallas_kernels.primitives.codebook import CodebookOperand
from pallas_kernels.primitives.dequantize import (
    MIN_COLUMNS,
    Fetch,
    PackedDecoder,
    divide,
    power_of_two,
)
from pallas_kernels.primitives.narrow import narrow_decoder
from pallas_kernels.primitives.trellis import DIGIT, TrellisDecoder, code_number


@dataclasses.dataclass(frozen=True)
class GatherDecoder:
    """The interface of `PackedDecoder`, in the order of the elements that `order` has, if any.

    `rows`: the path of a trellis runs along the rows, else the columns.
    """

    codebook: CodebookOperand
    length: int
    pages: int
    order: PackedDecoder | None = None
    rows: bool = False

    @property
    def columns(self) -> int:
        """Columns of the operand."""
        if self.order is not None:
            return self.order.columns
        return max(MIN_COLUMNS, power_of_two(self.length * self.pages))

    @property
    def centre(self) -> int:
        """Levels are what they are."""
        return 0

    def elements(self, column: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(page, element on the packed axis, whether there is one) of each column."""
        if self.order is not None:
            return self.order.elements(column)
        page, element = divide(column, self.length)
        return page, element, page < self.pages

    def tables(self) -> dict[str, np.ndarray]:
        """Constant input of the kernel: the levels, int32."""
        return {"levels": np.array(self.codebook.levels, np.int32)}

    def prepare(self, refs: Any) -> Any:
        """The table stays in memory."""
        return refs

    def load(self, fetch: Fetch) -> Any:
        """Nothing yet: bytes are fetched one for each element."""
        return fetch

    def operands(self, fetch: Fetch | Any, prepared: Any) -> list[tuple[int, jax.Array]]:
        """int8 operands [rows, columns] with their weights: level = sum(weight * operand)."""
        page, element, exists = self.elements(jnp.arange(self.columns))

        def field(plane: int, back: int) -> jax.Array:
            width = self.codebook.widths[plane]
            if back and not self.rows:  # no element before the first
                own, there = jnp.maximum(element - back, 0), exists & (element >= back)
            else:
                own, there = element, exists
            place, byte = divide(own, self.length * width // 8)
            rows_back = (back,) if self.rows else ()
            tile = fetch(plane, page, byte, there, *rows_back).astype(jnp.int32)
            found = (tile >> (width * place)[None, :]) & (2**width - 1)
            return jnp.where(there[None, :], found, 0) if back else found

        number = code_number(self.codebook, field)
        level = triton.load(prepared["levels"].at[number])
        if min(self.codebook.levels) >= -DIGIT and max(self.codebook.levels) < DIGIT:
            return [(1, level.astype(jnp.int8))]
        high = (level + DIGIT // 2) >> 7
        low = level - high * DIGIT
        return [(DIGIT, high.astype(jnp.int8)), (1, low.astype(jnp.int8))]


Decoder = PackedDecoder | GatherDecoder


def key_decoder(codebook: CodebookOperand, channels: int) -> Decoder:
    """The fastest decoder for keys packed along their channels."""
    # A look-up is written for four neighbouring bytes in one register. Rows of 8 bytes and more are
    # loaded so, if they are whole words; of others Triton gives each thread fewer bytes (seen at 32
    # channels, 3 bits), and answers were wrong (80 channels of a trellis, 10 bytes of path).
    if (narrow := narrow_decoder(codebook, channels)) is not None:
        return narrow
    row = channels * codebook.widths[-1]
    if not looked_up(codebook) or row < 64 or row % 32:
        return GatherDecoder(codebook, channels, 1)
    return packed_decoder(codebook, channels, 1, widest_unit(codebook, channels), rows=False)


def value_decoders(
    codebooks: tuple[CodebookOperand, ...], tokens: int, pages: int
) -> tuple[Decoder, ...]:
    """The fastest decoders for groups of values packed along the tokens, all in one order."""
    packed = [codebook for codebook in codebooks if looked_up(codebook)]
    unit = min((widest_unit(codebook, tokens * pages) for codebook in packed), default=None)
    order = None if unit is None else PackedDecoder(packed[0], tokens, pages, unit)
    return tuple(
        packed_decoder(codebook, tokens, pages, unit, rows=True)
        if unit is not None and looked_up(codebook)
        else GatherDecoder(codebook, tokens, pages, order, rows=codebook.code == "trellis")
        for codebook in codebooks
    )


def widest_unit(codebook: CodebookOperand, elements: int) -> int:
    """The width of which a decoder makes its look-ups, unless others need a narrower one."""
    # With look-ups of 8 bytes the operand is put together in shared memory: a trellis at two bits
    # of each path byte avoids it.
    return 2 if codebook.code == "trellis" and elements == 64 else codebook.widths[-1]


def looked_up(codebook: CodebookOperand) -> bool:
    """Whether byte look-ups serve it."""
    return codebook.bits <= 4


def packed_decoder(
    codebook: CodebookOperand, length: int, pages: int, unit: int, *, rows: bool
) -> PackedDecoder:
    """The look-ups of either code; a trellis whose path runs along `rows`, or the columns."""
    if codebook.code == "trellis":
        return TrellisDecoder(codebook, length, pages, unit, rows)
    return PackedDecoder(codebook, length, pages, unit)
