"""How tokens enter the cache: `cache.updating` in torch, in place.

    begin(state, counts, most)       # how many tokens come; pages for new blocks
    write(state, layer, k, v)        # once a layer, after that layer's attention
    commit(state)                    # the tokens count from now on

A sequence that does not fit is left as it was, and `overflow` says so.
"""

import torch
from torch import Tensor

from turboquant_jax.pytorch import compression, pages
from turboquant_jax.pytorch.compression import DEFINITION, Compression
from turboquant_jax.pytorch.state import Exact, State


def begin(state: State, counts: Tensor, most: int, *, completes: bool = True) -> None:
    """Announce `counts` [B] tokens, at most `most`, and give pages to the blocks they fill.

    `completes`: whether they may fill any. Who knows that they don't spares the search for pages.
    """
    table, layout = state.table, state.layout
    counts = counts.to(torch.int32)
    fits = (counts >= 0) & (counts <= most) & (table.lengths + counts <= state.capacity)
    fits = fits & ~table.overflow
    counts = torch.where(fits, counts, 0)
    if not completes:
        table.pending.copy_(counts)
        table.overflow.logical_or_(~fits)
        return
    slot, filled = layout.completed(table.lengths, counts, most)
    current = torch.gather(table.page_table, 1, slot.long())
    page, granted = pages.assign(table.references, current, filled)
    slot = torch.where(filled & granted[:, None], slot, layout.slots)  # or: dropped
    spare = torch.cat([table.pending_pages, table.pending_pages.new_zeros(state.batch, 1)], dim=1)
    table.pending_pages.copy_(spare.scatter(1, slot.long(), page)[:, :-1])
    table.pending.copy_(torch.where(granted, counts, 0))
    table.overflow.logical_or_(~fits | ~granted)


def write(state: State, layer: int, k: Tensor, v: Tensor, by: Compression = DEFINITION) -> None:
    """Write the pending tokens of one layer: keys after RoPE and values, [B, T, K, H].

    Of row b the first `pending[b]` tokens count, the rest is padding. Of a chunk (T > 1), the
    blocks that the window passes are compressed here.

    Raises:
      ValueError: keys or values of the wrong shape.
    """
    config, table, layout = state.config, state.table, state.layout
    expected = (state.batch, k.shape[1], config.num_kv_heads, config.head_dim)
    if tuple(k.shape) != expected or tuple(v.shape) != expected:
        got = f"{tuple(k.shape)} and {tuple(v.shape)}"
        raise ValueError(f"keys and values: got {got}, expected {expected}")
    dtype = state.window.keys.storage.dtype
    k, v = (x.detach().to(dtype) for x in (k, v))  # a cache has no gradients
    if layout.slots and k.shape[1] > 1:
        compression.compress_chunk(state, layer, k, v, by)
    slots = layout.written(table.lengths[:, None], table.pending[:, None], k.shape[1])
    for segment, slot in zip((state.sinks, state.window), slots, strict=True):
        _put(segment, layer, slot, k, v)


def commit(state: State, rows: Tensor | None = None, by: Compression = DEFINITION) -> None:
    """Count the pending tokens, which every layer has now written.

    `rows` int64 [n]: the sequences among which are all that single tokens complete a block of. Who
    knows them spares the work for the others; the result is the same.
    """
    table = state.table
    if state.layout.slots and (rows is None or rows.shape[0]):
        compression.compress_single(state, rows, by)
    given = table.pending_pages != pages.UNASSIGNED
    table.page_table.copy_(torch.where(given, table.pending_pages, table.page_table))
    table.pending_pages.fill_(pages.UNASSIGNED)
    table.lengths.add_(table.pending)
    table.pending.zero_()


def append(state: State, k: Tensor, v: Tensor, counts: Tensor | None = None) -> None:
    """Append up to T tokens [layers, B, T, K, H] to each sequence, in all layers."""
    batch, most = k.shape[1:3]
    if counts is None:
        counts = torch.full((batch,), most, dtype=torch.int32, device=state.device)
    begin(state, counts, most)
    for layer in range(state.config.num_layers):
        write(state, layer, k[layer], v[layer])
    commit(state)


def _put(segment: Exact, layer: int, slot: Tensor, k: Tensor, v: Tensor) -> None:
    """segment[layer, b, slot[b, i]] = new[b, i]; slots past the end are dropped."""
    _, batch, slots = segment.keys.lead
    row = layer * batch + torch.arange(batch, dtype=torch.int32, device=slot.device)[:, None]
    for rows, new in ((segment.keys, k), (segment.values, v)):
        rows.put(row * slots + slot, slot < slots, new)
