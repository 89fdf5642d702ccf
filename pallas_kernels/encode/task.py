"""What a program does with the blocks of one group of channels, of keys or of values.

What is rare is kept out of the loop over the blocks, whose registers it would take: a block that
opens a mean takes it before, and blocks with vectors so small, so large or not finite that sums of
their squares lose something are made once more after it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.encode.pool import GroupOperand
from pallas_kernels.primitives import triton
from pallas_kernels.primitives.codebook import PLANE_WIDTHS
from pallas_kernels.primitives.nearest import Levels
from pallas_kernels.primitives.packing import (
    field_of,
    join,
    pack,
    store_keys,
    store_values,
    weights,
)
from pallas_kernels.primitives.period import PERIOD
from pallas_kernels.primitives.quantize import (
    FEW_COLUMNS,
    Rotated,
    quantize,
    rotated,
    scaled,
    unsafe,
)
from pallas_kernels.primitives.tile import Centre, Columns, Tile

# Tokens that a program has in registers at a time.
TILE = 64


class JobPlace(NamedTuple):
    """Where the tokens of a block lie, its mean, and how that is turned; int32 scalars."""

    row: jax.Array
    slot: jax.Array
    mean: jax.Array
    number: jax.Array
    place: jax.Array


@dataclasses.dataclass(frozen=True)
class GroupTask:
    """A group of keys or of values, as a program sees it.

    jobs [jobs, 5]; `first_page` of the kv head, among those of the first one's row; vectors [rows,
    slots, H]; parts [parts, 1, H, H] of the rotation; packing
    matrices of the planes, of values only; centre, or None where nothing is taken off; `scales`
    [pages, tokens], of which another part has the other half if `shared`; [jobs, tokens] of all
    heads where there is a `first_job` of this one.
    """

    group: GroupOperand
    column: Columns
    levels: Levels
    tokens: int
    jobs: Any
    first_page: jax.Array
    first_job: jax.Array | None
    vectors: Any
    parts: Any
    packing: list[Any] | None
    centre: Centre | None
    planes: tuple[Any, ...]
    scales: Any
    shared: bool

    @property
    def tiles(self) -> list[jax.Array]:
        """Tokens of the tiles of a block."""
        rows = min(TILE, self.tokens)
        return [start + jnp.arange(rows) for start in range(0, self.tokens, rows)]

    def of_job(self, number: jax.Array, column: int) -> jax.Array:
        """A number of a job, or of the last one."""
        return self.jobs[jnp.minimum(number, self.jobs.shape[0] - 1), column]

    def place(self, number: jax.Array) -> JobPlace:
        """Where a job's block lies."""
        row, slot, mean = (self.of_job(number, column) for column in (0, 1, 3))
        if self.centre is None or self.centre.turned is None:
            return JobPlace(row, slot, mean, number, number)  # the last two mean nothing
        return JobPlace(row, slot, mean, number, self.of_job(number, 5))

    def page(self, number: jax.Array) -> jax.Array:
        """Which page it becomes, counted through all rows; negative: none."""
        page = self.of_job(number, 2)
        return jnp.where(page < 0, page, page + self.first_page)

    def line(self, first: jax.Array, turn: jax.Array, page: jax.Array) -> jax.Array:
        """Of the scales of job `first` + `turn`."""
        return page if self.first_job is None else self.first_job + first + turn

    def tile(self, place: JobPlace, token: jax.Array) -> Tile:
        """Some tokens of a block."""
        periods = -(-self.tokens // PERIOD)
        period = place.number * periods
        if periods > 1 and self.centre is not None and self.centre.turned is not None:
            period = period + (token >> 6).min()
        return Tile(
            source=self.vectors,
            row=place.row,
            slot=place.slot,
            token=token,
            column=self.column,
            parts=self.parts,
            centre=self.centre,
            mean_row=place.mean,
            period=period,
            place=place.place,
        )

    def other_scales(self, line: jax.Array) -> list[jax.Array]:
        """What has to stay in the words of the scales."""
        if not self.shared:
            return [jnp.zeros(token.shape, jnp.uint32) for token in self.tiles]
        at = self.scales.at
        words = [triton.load(at[jnp.maximum(line, 0), token]) for token in self.tiles]
        return [word & jnp.uint32(0xFFFF) for word in words]

    def packing_weights(self) -> list[list[jax.Array]]:
        """Of the planes of values, for each tile."""
        return [[weights(matrix, token) for matrix in self.packing or []] for token in self.tiles]

    def store(
        self,
        page: jax.Array,
        line: jax.Array,
        others: list[jax.Array],
        weights: list[list[jax.Array]],
        rotate: Callable[[jax.Array], Rotated],
    ) -> jax.Array:
        """Quantize a block and write its page; 1 for each row of a tile that is unsafe in one."""
        code, widths = self.group.code, PLANE_WIDTHS[self.group.code.bits]
        packed: list[Any] = [0.0] * len(widths)
        missed = jnp.zeros(self.tiles[0].shape, jnp.int32)
        for token, other, own in zip(self.tiles, others, weights, strict=True):
            tile = rotate(token)
            missed = missed | unsafe(tile)
            indices, scale = quantize(
                tile, self.column, self.group.rotation.gain, self.levels, code
            )
            bits = lax.bitcast_convert_type(scale.astype(jnp.bfloat16), jnp.uint16)
            word = bits.astype(jnp.uint32)
            if self.packing is not None:  # values have the high half
                word = other | (word << jnp.uint32(16))
            triton.store(self.scales.at[line, token], word)
            for i, width in enumerate(widths):
                fields = [field_of(index, i, code.bits) for index in indices]
                if self.packing is None:
                    store_keys(self.planes[i], page, token, fields, width, self.column)
                else:
                    packed[i] = packed[i] + pack(join(fields), own[i])
        if self.packing is not None:
            for plane, whole in zip(self.planes, packed, strict=True):
                store_values(plane, page, whole, self.column)
        return missed


def compress(part: GroupTask, first: jax.Array, count: jax.Array) -> None:
    """Jobs `first` to `first + count`, whose means are there."""
    token = part.tiles[0]
    start, nothing = part.place(first), jnp.zeros(token.shape, jnp.int32)
    tile = part.tile(start, token)
    rotation = [tile.rotation(within) for within in tile.pieces]
    packing = part.packing_weights()

    def usual(i: jax.Array, carry: tuple[JobPlace, jax.Array]) -> tuple[JobPlace, jax.Array]:
        place, missed = carry
        # a turn ahead, so that the vectors do not wait for it
        ahead, page = part.place(first + i + 1), part.page(first + i)
        line = part.line(first, i, page)
        others = part.other_scales(line)

        def rotate(token: jax.Array) -> Rotated:
            return rotated(part.tile(place, token), rotation)

        if len(part.tiles) == 1:  # before the branch, so that it does not wait for the page
            only = rotate(token)
        known = (lambda _: only) if len(part.tiles) == 1 else rotate
        found = lax.cond(
            triton.uniform(page) >= 0,
            lambda: part.store(page, line, others, packing, known),
            lambda: nothing,
        )
        return ahead, missed | (found << (i & 31))

    # for each row of a tile, in which blocks it is unsafe: a bit stands for every 32nd
    _, missed = lax.fori_loop(0, count, usual, (start, nothing))

    def rare(i: jax.Array, _: None) -> None:
        page, found = part.page(first + i), ((missed >> (i & 31)) & 1).max()

        @triton.when(triton.uniform(jnp.where(page >= 0, found, 0)) > 0)
        def again() -> None:
            place = part.place(first + i)
            line = part.line(first, i, page)
            part.store(
                page,
                line,
                part.other_scales(line),
                part.packing_weights(),
                lambda token: scaled(part.tile(place, token)),
            )

    @triton.when(triton.uniform(jnp.where(missed != 0, 1, 0).max()) > 0)
    def missed_some() -> None:
        triton.barrier()
        triton.rare_loop(count, rare, None)


def open_means(part: GroupTask, first: jax.Array, count: jax.Array) -> None:
    """Of the blocks among these jobs that open one."""

    def one(i: jax.Array, _: None) -> None:
        @triton.when((part.page(first + i) >= 0) & (part.of_job(first + i, 4) != 0))
        def opens() -> None:
            place = part.place(first + i)
            _open_mean(part.tile(place, jnp.arange(part.tokens)))

    triton.rare_loop(count, one, None)


def _open_mean(tile: Tile) -> None:
    """The mean of a block's finite vectors, and what is made of it, a few columns at a time."""
    column, tokens, centre = tile.column, tile.token.shape[0], tile.centre
    assert centre is not None

    def look(i: jax.Array, largest: jax.Array) -> jax.Array:
        x = tile.of_all_groups(i * FEW_COLUMNS + jnp.arange(FEW_COLUMNS)).astype(jnp.float32)
        # as integers, of which that of NaN is the largest: a maximum of floats passes it over
        bits = lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
        return jnp.maximum(largest, bits.max(axis=1))

    every = -(-tile.source.shape[2] // FEW_COLUMNS)
    finite = triton.rare_loop(every, look, jnp.zeros(tokens, jnp.int32)) < 0x7F800000
    count = jnp.maximum(jnp.where(finite, 1, 0).sum(), 1)

    def mean_of(channel: jax.Array) -> jax.Array:
        x = tile.stored_keys(channel)
        total = jnp.where(jnp.broadcast_to(finite[:, None], x.shape), x, 0.0).sum(axis=0)
        # by a constant where it can be: a division by another number may round otherwise
        return jnp.where(count == tokens, total / tokens, total / count.astype(jnp.float32))

    def add(i: jax.Array, rotated: jax.Array) -> jax.Array:
        within = i * FEW_COLUMNS + jnp.arange(FEW_COLUMNS)
        channel, exists = column.first + within, within < column.dim
        mean = jnp.where(exists, mean_of(channel), 0.0)
        triton.store(centre.means.at[tile.mean_row, channel], mean, mask=exists)
        if centre.turned is not None:
            tile.store_turned(channel, (mean, mean_of(centre.partner(channel))), exists)
            return rotated
        for part in tile.rotation(within):
            rotated = rotated + (part.astype(jnp.float32) * mean[None, :]).sum(axis=1)
        return rotated

    turns = column.count // FEW_COLUMNS
    rotated = triton.rare_loop(turns, add, jnp.zeros(column.count, jnp.float32))
    if centre.rotated is not None:
        place, exists = column.rotated()
        at = centre.rotated.at[tile.mean_row, column.first + place]
        triton.store(at, rotated, mask=exists)
    triton.barrier()
