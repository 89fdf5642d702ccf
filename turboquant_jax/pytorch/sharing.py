"""Sequences that share pages, in torch: `cache.sharing` in place, and what beams need of it."""

import torch
from torch import Tensor

from turboquant_jax.pytorch import pages
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
