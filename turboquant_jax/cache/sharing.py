"""Sequences that share pages: fork a prefix, free what is no longer needed.

A compressed block never changes, so a fork shares every block of its source, and copies what still
will change: the window, the sinks, the mean key. Not between `begin` and `commit`.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from turboquant_jax.cache import pages
from turboquant_jax.cache.state import Cache

_BY_ROW = "lengths", "pending", "overflow", "pending_pages"


def fork(cache: Cache, source: Int[Array, ""] | int, target: Int[Array, ""] | int) -> Cache:
    """Make row `target` a copy of row `source`, which is not changed and may go its own way.

    What the target held is freed. No page is copied; each block's gets one reference more, and
    pages that the source has for blocks to come stay its own. Use it to sample in parallel, for the
    beams of a search, or to start many sequences from one prefix.
    """
    source, target = jnp.asarray(source, jnp.int32), jnp.asarray(target, jnp.int32)
    table = cache.table
    held = jnp.arange(cache.layout.slots) < cache.layout.num_blocks(table.lengths[source])
    shared = jnp.where(held, table.page_table[source], pages.UNASSIGNED)
    references = pages.share(table.references, shared)
    references = pages.release(references, table.page_table[target])

    def copy_row(array, axis: int):
        row = jnp.take(array, source, axis=axis)
        return array.at[target].set(row) if axis == 0 else array.at[:, target].set(row)

    exact = {
        name: jax.tree.map(lambda array: copy_row(array, 1), getattr(cache, name))
        for name in ("sinks", "window", "key_mean")
    }
    return replace(cache, **exact).with_table(
        references=references,
        page_table=table.page_table.at[target].set(shared),
        lengths=copy_row(table.lengths, 0),
        overflow=copy_row(table.overflow, 0),
    )


def repeat(cache: Cache, count: int) -> Cache:
    """`count` sequences that go on from the only one, whose blocks they share.

    The pool gets the pages that each needs up to its capacity. Of the cache's values: not under
    `jax.jit`. Use it to sample several answers to a prompt that was read once.

    Raises:
      ValueError: a cache of several sequences, or a count below 1.
    """
    table, layout = cache.table, cache.layout
    if table.lengths.shape != (1,) or count < 1:
        raise ValueError(
            f"sequences: got {table.lengths.shape[0]} to be {count}, expected 1 to be at least 1"
        )
    held = jnp.arange(layout.slots) < layout.num_blocks(table.lengths[0])
    shared = jnp.tile(jnp.where(held, table.page_table, pages.UNASSIGNED), (count - 1, 1))
    # behind a sliding window no page stays shared
    kept = 0 if cache.config.sliding_window is not None else int(held.sum())
    more = (count - 1) * (layout.slots - kept)

    def copied(array: jax.Array, axis: int = 1) -> jax.Array:
        return jnp.repeat(array, count, axis)

    def grown(array: jax.Array) -> jax.Array:
        return jnp.pad(array, [(0, more if axis == 1 else 0) for axis in range(array.ndim)])

    exact = {
        name: jax.tree.map(copied, getattr(cache, name)) for name in ("sinks", "window", "key_mean")
    }
    parts = tuple(replace(part, pool=jax.tree.map(grown, part.pool)) for part in cache.parts)
    return replace(cache, **exact, parts=parts).with_table(
        references=pages.share(jnp.pad(table.references, (0, more)), shared),
        page_table=jnp.concatenate([table.page_table, shared]),
        **{name: copied(getattr(table, name), 0) for name in _BY_ROW},
    )


def free(cache: Cache, rows: Bool[Array, " B"]) -> Cache:
    """Empty these sequences; pages that nobody else refers to are free again."""
    table = cache.table
    given_up = jnp.where(rows[:, None], table.page_table, pages.UNASSIGNED)
    return cache.with_table(
        references=pages.release(table.references, given_up),
        page_table=jnp.where(rows[:, None], pages.UNASSIGNED, table.page_table),
        lengths=jnp.where(rows, 0, table.lengths),
        overflow=table.overflow & ~rows,
    )


def shared_blocks(cache: Cache) -> int:
    """How many blocks from the first on all sequences have in common: what `attend` reads once.

    Of the cache's values: not under `jax.jit`. 0 behind a sliding window, whose blocks go.
    """
    if cache.config.sliding_window is not None:
        return 0
    table, lengths = (np.asarray(x) for x in (cache.table.page_table, cache.lengths))
    same = (table == table[:1]).all(axis=0) & (table[0] != pages.UNASSIGNED)
    held = int(cache.config.num_blocks(lengths.min()))
    return int(np.cumprod(same[:held]).sum())


def free_pages(cache: Cache) -> Int[Array, ""]:
    """Pages of the pool that no sequence refers to."""
    return jnp.sum(cache.table.references == 0)
