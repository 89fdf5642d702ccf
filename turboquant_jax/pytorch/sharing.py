"""Sequences that share pages, in torch: `cache.sharing` in place, and what beams need of it."""

import torch
from torch import Tensor

from turboquant_jax.pytorch import pages
from turboquant_jax.pytorch.creation import create
from turboquant_jax.pytorch.state import State


def fork(state: State, source: int, target: int) -> None:
    """Make row `target` a copy of row `source`; see `cache.fork`."""
    table = state.table
    shared = _held(state)[source]
    pages.add(table.references, shared, 1)
    pages.add(table.references, table.page_table[target], -1)
    for rows in (state.sinks.keys, state.sinks.values, state.window.keys, state.window.values):
        rows.tensor[:, target] = rows.tensor[:, source]
    if state.key_mean is not None:
        state.key_mean[:, target] = state.key_mean[:, source]
    table.page_table[target] = shared
    table.lengths[target] = table.lengths[source]
    table.overflow[target] = table.overflow[source]


def reorder(state: State, source: Tensor) -> None:
    """Make row b a copy of what row source[b] was, of all rows at once: the beams of a search.

    Blocks are shared. Not between `begin` and `commit`.
    """
    table, source = state.table, source.to(state.device).long()
    own = source == torch.arange(state.batch, device=state.device)
    # a row that stays keeps its pages for blocks to come; those of the others are free again
    found = torch.where(own[:, None], table.page_table, _held(state)[source])
    table.page_table.copy_(found)
    table.references.zero_()
    pages.add(table.references, found, 1)
    for rows in (state.sinks.keys, state.sinks.values, state.window.keys, state.window.values):
        if rows.lead[2]:
            rows.tensor.copy_(rows.tensor.index_select(1, source))
    if state.key_mean is not None:
        state.key_mean.copy_(state.key_mean.index_select(1, source))
    table.lengths.copy_(table.lengths[source])
    table.overflow.copy_(table.overflow[source])


def free(state: State, rows: Tensor) -> None:
    """Empty these sequences, bool [B]; pages that nobody else refers to are free again."""
    table = state.table
    pages.add(table.references, torch.where(rows[:, None], table.page_table, pages.UNASSIGNED), -1)
    table.page_table.masked_fill_(rows[:, None], pages.UNASSIGNED)
    table.lengths.masked_fill_(rows, 0)
    table.overflow.logical_and_(~rows)


def _held(state: State) -> Tensor:
    """The page tables [B, slots] without pages for blocks to come."""
    count = state.config.num_blocks(state.table.lengths)
    slot = torch.arange(state.layout.slots, device=state.device)
    held = slot[None, :] < count[:, None]
    return torch.where(held, state.table.page_table, pages.UNASSIGNED)


def clear(state: State) -> None:
    """Empty all sequences; where there is a page for every place of the table, each has its own."""
    table = state.table
    dense = table.page_table.numel() == table.references.numel()
    own = torch.arange(table.page_table.numel(), dtype=torch.int32, device=state.device)
    table.page_table.copy_(own.view(table.page_table.shape) if dense else torch.tensor(-1))
    table.references.fill_(int(dense))
    table.pending_pages.fill_(pages.UNASSIGNED)
    for tensor in (table.lengths, table.pending, table.overflow):
        tensor.zero_()


def crop(state: State, count: int) -> None:
    """Take back the newest `count` tokens of every sequence.

    Right where the window still holds what is then not compressed; the caller knows.
    """
    state.table.lengths.sub_(count)


def grown(state: State, capacity: int) -> State:
    """The same sequences in a cache of a larger capacity, at least that of its rings."""
    found = _like(state, state.batch, capacity)
    slots = state.layout.slots
    _copy_rows(state, found, torch.arange(state.batch, device=state.device))
    old, new = state.table, found.table
    count = old.references.shape[0]
    new.page_table.fill_(pages.UNASSIGNED)
    new.page_table[:, :slots] = old.page_table
    new.references.zero_()
    new.references[:count] = old.references
    for part, other in zip(state.parts, found.parts, strict=True):
        for rows, wider in zip(part.pool.rows, other.pool.rows, strict=True):
            wider.tensor[:, :count] = rows.tensor
    return found


def selected(state: State, indices: Tensor) -> State:
    """Sequence i is what sequence indices[i] was, each with pages of its own."""
    source = indices.to(state.device).long()
    found = _like(state, source.shape[0], state.capacity)
    _copy_rows(state, found, source)
    table = state.table.page_table[source].clamp(min=0).long()
    for part, other in zip(state.parts, found.parts, strict=True):
        for rows, own in zip(part.pool.rows, other.pool.rows, strict=True):
            own.tensor.copy_(rows.tensor[:, table.flatten()])
    return found


def _like(state: State, batch: int, capacity: int) -> State:
    """An empty cache with the same codecs."""
    return create(state.config, batch, capacity, like=state, device=state.device)


def _copy_rows(state: State, found: State, source: Tensor) -> None:
    """Lengths and everything in full precision, of the rings of one size."""
    for name in ("lengths", "pending", "overflow"):
        getattr(found.table, name).copy_(getattr(state.table, name)[source])
    for segment in ("sinks", "window"):
        for side in ("keys", "values"):
            old, new = (getattr(getattr(s, segment), side).tensor for s in (state, found))
            new[:, :, : old.shape[2]] = old[:, source]
    if state.key_mean is not None and found.key_mean is not None:
        found.key_mean.copy_(state.key_mean[:, source])
