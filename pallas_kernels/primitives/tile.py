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


@dataclasses.dataclass(frozen=True)
class Tile:
    """References inside a kernel, and where in them.

    source [rows, slots, H]; parts [parts, 1, H, H] of the rotation; means and rotated_means
    [rows, H], or None where nothing is taken off.
    """

    source: Any
    row: jax.Array
    slot: jax.Array
    token: jax.Array
    column: Columns
    parts: Any
    means: Any
    rotated_means: Any
    mean_row: jax.Array

    @property
    def centred(self) -> bool:
        """Whether a mean is taken off."""
        return self.means is not None

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
        at = self.means.at[self.mean_row, self.column.first + within]
        return self._load(at, within < self.column.dim)

    def rotated_mean(self) -> jax.Array:
        """Pi mean / gain."""
        place, exists = self.column.rotated()
        return self._load(self.rotated_means.at[self.mean_row, self.column.first + place], exists)

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
