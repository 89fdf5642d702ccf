"""Vectors of one block, one kv head and one group of channels, in memory, and what is done to them.

A kernel reads them from here whenever it needs them: what it held in registers instead would cost
it other programs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.primitives import triton
from pallas_kernels.primitives.dequantize import power_of_two
from pallas_kernels.primitives.period import PERIOD, STEPS


@dataclasses.dataclass(frozen=True)
class Columns:
    """Channels of a group, padded to a power of two.

    As loaded, the padding is at the end. Once rotated, it is at the end of each eighth, so that
    codes that share a byte are a power of two of columns apart.
    """

    dim: int
    first: int

    @property
    def count(self) -> int:
        """Columns."""
        return max(16, power_of_two(self.dim))

    @property
    def within(self) -> jax.Array:
        """Position in the group of each column, as loaded."""
        return jnp.arange(self.count)

    def rotated(self, eighths: int = 8) -> tuple[jax.Array, jax.Array]:
        """Position in the group of each column once rotated, and which columns are channels."""
        size, column = self.count // 8, jnp.arange(eighths * (self.count // 8))
        if self.dim == self.count:
            return column, column < self.count
        place = column & (size - 1)
        return lax.div(column, jnp.full_like(column, size)) * (self.dim // 8) + place, (
            place < self.dim // 8
        )


# Columns whose angles are in registers at a time.
PIECE = 32


@dataclasses.dataclass(frozen=True)
class Centre:
    """What is taken off the keys of one kv head: references inside a kernel.

    means [rows, H]; either rotated [rows, H], which comes off after the rotation, or turned
    [periods, 2, H] with angles [64, 2, H] and opening [T, 2, H], see `encode.PreRopeOperand`.
    """

    means: Any
    rotated: Any
    turned: Any
    angles: Any
    opening: Any
    rotary: int

    def partner(self, channel: jax.Array) -> jax.Array:
        """The other channel of the pair."""
        channels, half = self.means.shape[1], self.rotary // 2
        rest = (channels - self.rotary) // 2
        of_rest = jnp.where(channel < self.rotary + rest, channel + rest, channel - rest)
        of_rotary = jnp.where(channel < half, channel + half, channel - half)
        return jnp.where(channel < self.rotary, of_rotary, of_rest)


@dataclasses.dataclass(frozen=True)
class Tile:
    """References inside a kernel, and where in them.

    source [rows, slots, H]; parts [parts, 1, H, H] of the rotation; centre, or None where nothing
    is taken off: the row of its mean, the period of the tokens (of the first of them, where a
    block has several and opens), and the place in a period of the block's first token.
    """

    source: Any
    row: jax.Array
    slot: jax.Array
    token: jax.Array
    column: Columns
    parts: Any
    centre: Centre | None
    mean_row: jax.Array
    period: jax.Array
    place: jax.Array

    @property
    def known_centre(self) -> Centre:
        """Where one is there."""
        assert self.centre is not None
        return self.centre

    @property
    def has_rotated_mean(self) -> bool:
        """Whether a mean comes off after the rotation."""
        return self.centre is not None and self.centre.rotated is not None

    @property
    def has_turned_mean(self) -> bool:
        """Whether a mean before RoPE comes off before the rotation."""
        return self.centre is not None and self.centre.turned is not None

    @property
    def pieces(self) -> list[jax.Array]:
        """Columns that are taken off and rotated at a time: more would not fit into registers."""
        if not self.has_turned_mean:
            return [self.column.within]
        size = min(PIECE, self.column.count // 2 if self.has_pairs else self.column.count)
        starts = range(0, self.column.count // (1 + self.has_pairs), size)
        if not self.has_pairs:
            return [start + jnp.arange(size) for start in starts]
        half = self.column.count // 2
        return [begin + jnp.arange(size) for start in starts for begin in (start, start + half)]

    @property
    def has_pairs(self) -> bool:
        """Whether the columns are those of a head in which RoPE turns all channels."""
        if not self.has_turned_mean:
            return False
        channels, rotary = self.column.count, self.known_centre.rotary
        whole = channels == self.column.dim == self.source.shape[2] == rotary
        return whole and channels >= 32  # a product takes 16 columns

    def all_centred(self) -> list[jax.Array]:
        """`centred` of all pieces."""
        pieces = self.pieces
        if not self.has_pairs:
            return [self.centred(within) for within in pieces]
        found = []
        for first, second in zip(pieces[::2], pieces[1::2], strict=True):
            x, y = (self.vectors(within).astype(jnp.float32) for within in (first, second))
            cos, sin = self._angles(first)
            a, b = (self._turned(0, within, x.shape) for within in (first, second))
            found += [
                triton.rounded(triton.fma(-b, sin, triton.fma(-a, cos, x)), self.parts.dtype),
                triton.rounded(triton.fma(a, sin, triton.fma(-b, cos, y)), self.parts.dtype),
            ]
        return found

    def centred(self, within: jax.Array) -> jax.Array:
        """[tokens, columns] as they are rotated, in the type of the rotation.

        A mean before RoPE is taken off: numbers whose products are exact in float32, so that it is
        what `pre_rope.center` gives.
        """
        x = self.vectors(within)
        if not self.has_turned_mean:
            return x.astype(self.parts.dtype)
        own, other = (self._turned(i, within, x.shape) for i in (0, 1))
        cos, sin = self._angles(within)
        found = triton.fma(-other, sin, triton.fma(-own, cos, x.astype(jnp.float32)))
        return triton.rounded(found, self.parts.dtype)

    def _angles(self, within: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Cosines and signed sines [tokens, columns] of the tokens' places, float32."""
        centre, channel = self.known_centre, self.column.first + within
        place = (self.place + self.token) & (PERIOD - 1)
        shape = self.token.shape[0], within.shape[0]
        exists = jnp.broadcast_to((within < self.column.dim)[None, :], shape)
        cos, sin = (
            self._load(centre.angles.at[place[:, None], i, channel[None, :]], exists)
            for i in (0, 1)
        )
        return cos.astype(jnp.float32), sin.astype(jnp.float32)

    def _turned(self, i: int, within: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The mean of the tokens' period, or of each channel the other one of its pair."""
        at = self.known_centre.turned.at[self.period, i, self.column.first + within]
        return jnp.broadcast_to(self._load(at, within < self.column.dim)[None, :], shape)

    def stored_keys(self, channel: jax.Array) -> jax.Array:
        """[tokens, channels] of which a mean is taken, float32: turned back where it is turned."""
        x = self.of_all_groups(channel).astype(jnp.float32)
        if not self.has_turned_mean:
            return x
        centre = self.known_centre
        exists = jnp.broadcast_to((channel < self.source.shape[2])[None, :], x.shape)
        cos, sin = (
            triton.load(
                centre.opening.at[self.token[:, None], i, channel[None, :]], mask=exists, other=0.0
            )
            for i in (0, 1)
        )
        other = self.of_all_groups(centre.partner(channel)).astype(jnp.float32)
        return x * cos - other * sin

    def store_turned(
        self, channel: jax.Array, pair: tuple[jax.Array, jax.Array], exists: jax.Array
    ) -> None:
        """A mean at some channels and at their partners, turned to the periods of a first block."""
        centre, (mean, other) = self.known_centre, pair
        for i in range(-(-self.token.shape[0] // PERIOD)):
            cos, sin = (
                triton.load(centre.opening.at[i * PERIOD, j, channel], mask=exists, other=0.0)
                * (1.0 / STEPS)  # of the first place, whose angle is 0
                for j in (0, 1)
            )
            turned = mean * cos + other * sin, other * cos - mean * sin
            for j, part in enumerate(turned):
                # to the bits whose products with numbers of 11 bits are exact
                bits = lax.bitcast_convert_type(part, jnp.int32) + (1 << 10)
                part = lax.bitcast_convert_type(bits & -(1 << 11), jnp.float32)
                triton.store(centre.turned.at[self.period + i, j, channel], part, mask=exists)

    def vectors(self, within: jax.Array) -> jax.Array:
        """[tokens, columns] from a ring of slots."""
        shape = self.token.shape[0], within.shape[0]
        exists = jnp.broadcast_to((within < self.column.dim)[None, :], shape)
        return self._load(self._at(self.column.first + within), exists)

    def of_all_groups(self, channel: jax.Array) -> jax.Array:
        """[tokens, channels], 0 beyond the last one."""
        shape = self.token.shape[0], channel.shape[0]
        exists = jnp.broadcast_to((channel < self.source.shape[2])[None, :], shape)
        return triton.load(self._at(channel), mask=exists, other=0.0)

    def _at(self, channel: jax.Array) -> Any:
        place, slots = self.slot + self.token, self.source.shape[1]
        place = jnp.where(place >= slots, place - slots, place)
        return self.source.at[self.row, place[:, None], channel[None, :]]

    def mean(self, within: jax.Array) -> jax.Array:
        """[columns], to be taken off."""
        at = self.known_centre.means.at[self.mean_row, self.column.first + within]
        return self._load(at, within < self.column.dim)

    def rotated_mean(self) -> jax.Array:
        """Pi mean / gain."""
        place, exists = self.column.rotated()
        return self._load(
            self.known_centre.rotated.at[self.mean_row, self.column.first + place], exists
        )

    def rotation(self, within: jax.Array) -> list[jax.Array]:
        """The parts of Pi / gain [rotated columns, columns]."""
        place, exists = self.column.rotated()
        mask = exists[:, None] & (within < self.column.dim)[None, :]
        return [
            self._load(self.parts.at[i, 0, place[:, None], within[None, :]], mask)
            for i in range(self.parts.shape[0])
        ]

    def _load(self, at: Any, exists: jax.Array) -> jax.Array:
        if self.column.dim == self.column.count:
            return triton.load(at)
        return triton.load(at, mask=exists, other=0.0)
