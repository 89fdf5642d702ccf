"""Sequences that share pages: fork a prefix, free what is no longer needed.

A compressed block never changes, so a fork shares every block of its source, and copies what still
will change: the window, the sinks, the mean key. Not between `begin` and `commit`.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from turboquant_jax.cache import pages
from turboquant_jax.cache.state import Cache


def fork(cache: Cache, source: Int[Array, ""] | int, target: Int[Array, ""] | int) -> Cache:
    """Make row `target` a copy of row `source`, which is not changed and may go its own way.

    What the target held is freed. No page is copied; each block's gets one reference more, and
    pages that the source has for blocks to come stay its own. Use it to sample in parallel, for the
    beams of a search, or to start many sequences from one prefix.
    """
    source, target = jnp.asarray(source, jnp.int32), jnp.asarray(target, jnp.int32)
    held = jnp.arange(cache.page_table.shape[1]) < cache.config.num_blocks(cache.lengths[source])
    shared = jnp.where(held, cache.page_table[source], pages.UNASSIGNED)
    references = pages.share(cache.references, shared)
    references = pages.release(references, cache.page_table[target])

    def copy_row(array, axis: int):
        row = jnp.take(array, source, axis=axis)
        return array.at[target].set(row) if axis == 0 else array.at[:, target].set(row)

    return replace(
        cache,
        references=references,
        page_table=cache.page_table.at[target].set(shared),
        lengths=copy_row(cache.lengths, 0),
        overflow=copy_row(cache.overflow, 0),
        **{
            name: jax.tree.map(lambda array: copy_row(array, 1), getattr(cache, name))
            for name in ("sinks", "window", "key_mean")
        },
    )


def free(cache: Cache, rows: Bool[Array, " B"]) -> Cache:
    """Empty these sequences; pages that nobody else refers to are free again."""
    given_up = jnp.where(rows[:, None], cache.page_table, pages.UNASSIGNED)
    return replace(
        cache,
        references=pages.release(cache.references, given_up),
        page_table=jnp.where(rows[:, None], pages.UNASSIGNED, cache.page_table),
        lengths=jnp.where(rows, 0, cache.lengths),
        overflow=cache.overflow & ~rows,
    )


def free_pages(cache: Cache) -> Int[Array, ""]:
    """Pages of the pool that no sequence refers to."""
    return jnp.sum(cache.references == 0)
