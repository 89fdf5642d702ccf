"""Which split of which sequence a program of the decode kernel takes, from the lengths.

A batch of sequences that are equally long has the splits of the schedule, `splits` of each. Of
others a sequence has as many as it has shares of the work, where a share is what each of those
would have; so no program has more than in an equal batch of the same tokens, and there are at most
as many programs more as there are sequences. They are launched in any case and leave at once where
they are not needed. Everything depends on lengths alone.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.decode_attention.schedule import MIN_TILES
from pallas_kernels.primitives import triton
from pallas_kernels.primitives.dequantize import power_of_two

# Most sequences of a batch that each program looks at; of more every one has the schedule's splits.
MOST = 512


class Task(NamedTuple):
    """The work of a program, in int32 scalars.

    head: a kv head. split: its number among the `splits` of the sequence. slot: where its sums go.
    more: the first slot of those splits that are beyond the schedule's. exists: if there is any.
    """

    head: Any
    sequence: Any
    split: Any
    splits: Any
    slot: Any
    more: Any
    exists: Any


def dealt(batch: int) -> bool:
    """Whether the splits of a sequence are found by the program, or the schedule's."""
    return 1 < batch <= MOST


def programs(batch: int, splits: int) -> int:
    """Of a kv head, a sequence."""
    return splits + 1 if dealt(batch) else splits


def slots(batch: int, splits: int) -> int:
    """For the sums of the splits of a kv head: those of the schedule, then the others.

    Of the others there are fewer than of the schedule's: a sequence that has some has all of its
    own, and every other one at least one.
    """
    return batch * splits * (2 if dealt(batch) else 1)


def sequences(batch: int) -> jax.Array:
    """Numbers of all sequences as a vector for `find`: the last one stands in beyond the end."""
    return jnp.minimum(jnp.arange(power_of_two(batch)), batch - 1)


def find(batch: int, splits: int, work: jax.Array) -> Task:
    """The task of this program of the grid (programs, kv head, sequence).

    `work`: int32 tiles of each of the `sequences`.
    """
    number = triton.program_id(2) * programs(batch, splits) + triton.program_id(0)
    alike = (work.max() == work.min()).astype(jnp.int32)
    found = lax.cond(
        triton.uniform(alike) > 0,
        lambda: _alike(batch, splits, number),
        lambda: _by_length(batch, splits, number, work),
    )
    sequence, split, count, more, exists = found
    slot = jnp.where(split < splits, sequence * splits, more - splits) + split
    return Task(triton.program_id(1), sequence, split, count, slot, more, exists > 0)


def _alike(batch: int, splits: int, number: jax.Array) -> tuple:
    sequence = jnp.minimum(lax.div(number, splits), batch - 1)
    exists = (number < batch * splits).astype(jnp.int32)
    zero = number - number  # a branch yields no constants
    return sequence, number - sequence * splits, zero + splits, zero, exists


def _by_length(batch: int, splits: int, number: jax.Array, work: jax.Array) -> tuple:
    which = jnp.arange(work.shape[0])
    work = jnp.where(which < batch, work, 0)
    share = jnp.maximum(_share(work.sum(), batch, splits), MIN_TILES)
    count = jnp.maximum(_quotient(work, jnp.full_like(work, share)), 1)
    count = jnp.where(which < batch, count, 0)
    end = jnp.cumsum(count)
    sequence = triton.uniform((end <= number).astype(jnp.int32).sum())
    exists = (sequence < batch).astype(jnp.int32)
    sequence = jnp.minimum(sequence, batch - 1)

    def before(x: jax.Array) -> jax.Array:
        return triton.uniform(jnp.where(which < sequence, x, 0).sum())

    own = triton.uniform(jnp.where(which == sequence, count, 0).sum())
    more = batch * splits + before(jnp.maximum(count - splits, 0))
    return sequence, number - before(count), own, more, exists


def _share(total: jax.Array, batch: int, splits: int) -> jax.Array:
    """Tiles that a program has at most: those of each in an equal batch."""
    return _quotient(total, jnp.int32(batch * splits))


def _quotient(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y, rounded up."""
    return lax.div(x + y - 1, y)
