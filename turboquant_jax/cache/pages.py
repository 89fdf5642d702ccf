"""Pages of the pool: allocation as a pure function of an array of reference counts.

A page is free while nobody refers to it. `references` (int32 [pages]) is all there is: no list
beside it that could disagree, and everything works under `jit`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

UNASSIGNED = -1  # entry of a page table that has no page


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
