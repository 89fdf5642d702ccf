"""Pages of the pool: allocation as a pure function of an array of reference counts.

A page is free while nobody refers to it. `references` (int32 [pages]) is all there is: no list
beside it that could disagree, and everything works under `jit`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

UNASSIGNED = -1  # entry of a page table that has no page


def assign(
    references: Int[Array, " pages"], current: Int[Array, "B n"], filled: Bool[Array, "B n"]
) -> tuple[Int[Array, "B n"], Bool[Array, " B"], Int[Array, " pages"]]:
    """Give every filled entry a page that nobody else refers to, to be written anew.

    An entry keeps its `current` page where it is the only one that refers to it. If all that refer
    to a page are filled at once, the last of them keeps it: a pool that has a page for every entry
    never runs out. Others get free pages, and release what they had.

    Returns:
      pages: the page of each filled entry of the sequences that were granted theirs.
      granted: the sequences that got all they needed; see `allocate`.
      references: as they are then.
    """
    count = references.shape[0]
    held = filled & (current != UNASSIGNED)
    index = jnp.where(held, current, count)
    entry = jnp.arange(filled.size, dtype=jnp.int32).reshape(filled.shape)
    leaving = jnp.zeros(count, jnp.int32).at[index].add(1, mode="drop")
    last = jnp.zeros(count, jnp.int32).at[index].max(entry, mode="drop")
    page = jnp.where(held, current, 0)
    alone = held & (references[page] == 1)
    keeps = held & (leaving[page] == references[page]) & (last[page] == entry)
    # should one of them not get its pages it would stay, and nobody may then take its page over
    fits = jnp.sum(filled & ~keeps) <= jnp.sum(references == 0)
    keeps = jnp.where(fits, keeps, alone)
    wanted = filled & ~keeps
    new, granted, references = allocate(references, wanted)
    left = jnp.where(wanted & granted[:, None], current, UNASSIGNED)
    return jnp.where(keeps, current, new), granted, release(references, left)


def allocate(
    references: Int[Array, " pages"], wanted: Bool[Array, "B n"]
) -> tuple[Int[Array, "B n"], Bool[Array, " B"], Int[Array, " pages"]]:
    """Give every wanted entry a free page, all of a sequence's or none of them.

    Sequences are served in order, and one that does not fit also takes its share from those behind
    it: who comes first does not depend on who gives up.

    Returns:
      pages: the page of each entry, UNASSIGNED where none was wanted or the sequence got none.
      granted: which sequences got all they wanted (wanting nothing is granted).
      references: with one reference to each page given.
    """
    count = references.shape[0]
    rank = jnp.cumsum(wanted.ravel()).reshape(wanted.shape) - 1
    granted = ~jnp.any(wanted & (rank >= jnp.sum(references == 0)), axis=1)
    free = jnp.nonzero(references == 0, size=wanted.size, fill_value=count)[0]
    given = wanted & granted[:, None]
    pages = jnp.where(given, free[jnp.where(given, rank, 0)], UNASSIGNED).astype(jnp.int32)
    return pages, granted, _add(references, pages, 1)


def share(references: Int[Array, " pages"], pages: Int[Array, "*n"]) -> Int[Array, " pages"]:
    """One more reference to each of these pages; UNASSIGNED entries count for nothing."""
    return _add(references, pages, 1)


def release(references: Int[Array, " pages"], pages: Int[Array, "*n"]) -> Int[Array, " pages"]:
    """One reference less to each of these pages; at zero a page is free."""
    return _add(references, pages, -1)


def _add(references, pages, amount):
    # negative indices would wrap around, so UNASSIGNED is moved past the end, and dropped there
    index = jnp.where(pages == UNASSIGNED, references.shape[0], pages)
    return references.at[index].add(jnp.int32(amount), mode="drop")
