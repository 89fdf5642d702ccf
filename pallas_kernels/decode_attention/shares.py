"""How many splits each sequence of a batch has: about as many tokens in each."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.primitives import triton
from pallas_kernels.primitives.dequantize import power_of_two


class Place(NamedTuple):
    """Of a program: which of how many splits of a kv head of a sequence it has."""

    split: jax.Array
    splits: int | jax.Array
    head: jax.Array
    sequence: jax.Array


@dataclasses.dataclass(frozen=True)
class Shares:
    """Of `batch` sequences, `splits` each on average and at most `most`.

    Lengths count in tiles of `tile` tokens, up to `limit` tokens, which is what a page table holds;
    `more` tiles come on top for everyone.
    """

    batch: int
    splits: int
    most: int
    tile: int
    limit: int
    more: int

    @property
    def even(self) -> bool:
        """Whether every sequence has as many, whatever the lengths."""
        return self.most == self.splits

    def count(self, lengths: Any, sequence: jax.Array) -> jax.Array:
        """Splits of a sequence, at least one; `lengths` [batch] is a reference.

        Rounded up, so that no split has more than its share: there are up to `batch` more of them.
        """

        def tiles(length: jax.Array) -> jax.Array:
            seen = jnp.minimum(length, jnp.full_like(length, self.limit))
            return lax.div(seen, jnp.full_like(seen, self.tile)) + self.more

        at = jnp.arange(power_of_two(self.batch))
        inside = at < self.batch
        every = triton.load(lengths.at[at], mask=inside, other=0)
        total = jnp.where(inside, tiles(every), 0).sum()
        own = tiles(lengths[sequence]) * (self.splits * self.batch)
        return jnp.minimum(lax.div(own + total - 1, total), self.most)
