"""Codes of any width, in any order -> int8 operands by a gather: right everywhere, fast nowhere.

Serves 5 to 8 bits, lengths that the packed look-up cannot cut into words, and a group of value
channels whose code order differs from that of the first group. Every element is fetched as a byte
of its own from each plane, and its level is read from a table in memory. A level is two digits in
base 128 where one signed byte cannot hold it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import triton
from pallas_kernels.codebook import Codebook
from pallas_kernels.dequantize import (
    MIN_COLUMNS,
    Fetch,
    PackedDecoder,
    divide,
    power_of_two,
)

DIGIT = 128


@dataclasses.dataclass(frozen=True)
class GatherDecoder:
    """The interface of `PackedDecoder`, in the order of the elements that `order` has, if any."""

    codebook: Codebook
    length: int
    pages: int
    order: PackedDecoder | None = None

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

    def operands(
        self, fetch: Fetch | Any, prepared: Any, interpret: bool
    ) -> list[tuple[int, jax.Array]]:
        """int8 operands [rows, columns] with their weights: level = sum(weight * operand)."""
        del interpret
        page, element, exists = self.elements(jnp.arange(self.columns))
        code, done = None, 0
        for plane, width in enumerate(self.codebook.widths):
            count = self.length * width // 8
            place, byte = divide(element, count)
            tile = fetch(plane, page, byte, exists).astype(jnp.int32)
            field = (tile >> (width * place)[None, :]) & (2**width - 1)
            code = field if code is None else code | field << done
            done += width
        level = triton.load(prepared["levels"].at[code])
        if self.codebook.bits <= 4:
            return [(1, level.astype(jnp.int8))]
        high = (level + DIGIT // 2) >> 7
        low = level - high * DIGIT
        return [(DIGIT, high.astype(jnp.int8)), (1, low.astype(jnp.int8))]


Decoder = PackedDecoder | GatherDecoder


def key_decoder(codebook: Codebook, channels: int) -> Decoder:
    """The fastest decoder for keys packed along their channels."""
    # A look-up is written for four neighbouring bytes in one register. Rows of 8 bytes and more are
    # loaded so; of narrower ones Triton gives each thread fewer bytes (seen at 32 channels, 3
    # bits).
    if codebook.bits <= 4 and channels * codebook.widths[-1] >= 64:
        return PackedDecoder(codebook, channels, 1, codebook.widths[-1])
    return GatherDecoder(codebook, channels, 1)


def value_decoders(codebooks: tuple[Codebook, ...], tokens: int, pages: int) -> tuple[Decoder, ...]:
    """The fastest decoders for groups of values packed along the tokens, all in one order."""
    packed = [codebook for codebook in codebooks if codebook.bits <= 4]
    unit = min((codebook.widths[-1] for codebook in packed), default=None)
    if unit is None:
        return tuple(GatherDecoder(codebook, tokens, pages) for codebook in codebooks)
    order = PackedDecoder(packed[0], tokens, pages, unit)
    return tuple(
        PackedDecoder(codebook, tokens, pages, unit)
        if codebook.bits <= 4
        else GatherDecoder(codebook, tokens, pages, order)
        for codebook in codebooks
    )
