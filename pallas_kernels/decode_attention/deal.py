"""Which tiles of which sequences a program of the decode kernel takes, from the lengths.

The tiles of all sequences of a batch lie in a row, and every program of a kv head takes an equal
stretch of them, a piece of one sequence or pieces of several. Of sequences that are equally long
these are the splits of the schedule. There are as many programs as in an equal batch, whatever the
lengths: more would share schedulers of a multiprocessor that others have alone.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.decode_attention.schedule import Schedule
from pallas_kernels.primitives import triton
from pallas_kernels.primitives.dequantize import power_of_two

# Most sequences of a batch that each program looks at.
MOST = 512
# Warps that an H100 runs at once, each with all registers that it may have.
WARPS = 132 * 8


class Stretch(NamedTuple):
    """What a program takes, in int32 scalars: number of the program; tiles from `begin` to `end`.

    They are of the sequences from `first` to `last`, and `start` is the first tile of `first`.
    """

    number: Any
    begin: Any
    end: Any
    first: Any
    last: Any
    start: Any


class Piece(NamedTuple):
    """Tiles of a sequence from `begin` to `end`; `slot`: where their sums go.

    `head`: its number; of several formats its place among `heads`.
    """

    head: Any
    sequence: Any
    begin: Any
    end: Any
    slot: Any


def dealt(batch: int, kv_heads: int, schedule: Schedule) -> bool:
    """Whether programs find their sequences by the lengths: if all of them run at once.

    It takes registers. Programs of more warps, or more of them, would lose others beside them; of
    programs that begin when others end, every sequence has the splits of the schedule.
    """
    warps = batch * kv_heads * schedule.splits * schedule.warps
    return schedule.dealt and 1 < batch <= MOST and warps <= WARPS


def slots(batch: int, splits: int, dealt: bool) -> int:
    """For the pieces of a kv head: each program, and each sequence after the first, begins one."""
    return batch * (splits + 1 if dealt else splits)


def sequences(batch: int) -> jax.Array:
    """Numbers of all sequences as a vector: the last one stands in beyond the end."""
    return jnp.minimum(jnp.arange(power_of_two(batch)), batch - 1)


def find(batch: int, splits: int, work: jax.Array) -> Stretch:
    """That of this program of the grid (splits, kv head, sequence); `work`: tiles of each."""
    number = triton.program_id(2) * splits + triton.program_id(0)
    work, end = _in_a_row(batch, work)
    total, programs = work.sum(), batch * splits
    low, high = lax.div(number * total, programs), lax.div((number + 1) * total, programs)
    before = (end <= low).astype(jnp.int32)
    first, last = before.sum(), (end - work < high).astype(jnp.int32).sum() - 1
    start = (work * before).sum()
    found = (triton.uniform(x) for x in (low, high, first, jnp.minimum(last, batch - 1), start))
    return Stretch(number, *found)


def pieces_of(batch: int, splits: int, work: jax.Array, sequence: jax.Array) -> tuple:
    """(the first slot, the number of slots) of a sequence."""
    work, end = _in_a_row(batch, work)
    own = jnp.arange(work.shape[0]) == sequence
    total, stop = work.sum(), jnp.where(own, end, 0).sum()
    count = jnp.where(own, work, 0).sum()

    def program(tile: jax.Array) -> jax.Array:
        return lax.div((tile + 1) * (batch * splits) - 1, jnp.maximum(total, 1))

    first = program(stop - count)
    return first + sequence, jnp.where(count > 0, program(stop - 1) - first + 1, 0)


def _in_a_row(batch: int, work: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The work of each sequence, nothing beyond the last; where each ends."""
    work = jnp.where(jnp.arange(work.shape[0]) < batch, work, 0)
    return work, jnp.cumsum(work)
