"""From the window into the pool: `cache.compression` in torch, in place.

Every sequence that may have completed a block is encoded, and what none did goes nowhere: shapes do
not depend on values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from turboquant_jax.pytorch import packing, pre_rope, trellis
from turboquant_jax.pytorch.codec import Search
from turboquant_jax.pytorch.state import Part, State


@dataclass(frozen=True)
class Compression:
    """What compresses: the GPU kernel, or this module, where `search` finds a trellis' paths."""

    kernels: bool = False
    search: Search = trellis.search


DEFINITION = Compression()


def compress_single(state: State, rows: Tensor | None = None, by: Compression = DEFINITION) -> None:
    """Compress what sequences with one pending token completed, in all layers.

    `rows` [n]: those that come into question, all of them unless given.
    """
    config, table, layout = state.config, state.table, state.layout
    slot, filled = layout.completed(table.lengths, table.pending, 1)
    complete = filled[:, 0] & (table.pending == 1)
    page = torch.gather(table.pending_pages, 1, slot.long())[:, 0]
    first = config.num_blocks(table.lengths)
    if by.kernels:
        from turboquant_jax.pytorch import kernels

        start = layout.window_slot(layout.block_start(first))
        kernels.encode_window(state, start, torch.where(complete, page, -1), first)
        return
    if rows is None and state.device.type == "cpu" and not torch.compiler.is_compiling():
        rows = complete.nonzero()[:, 0]  # a CPU may look
        if not len(rows):
            return
    if rows is None:
        rows = torch.arange(state.batch, device=state.device)
    complete, page, first = complete[rows], page[rows], first[rows]
    token = torch.arange(config.block, dtype=torch.int32, device=state.device)
    place = layout.window_slot(layout.block_start(first)[:, None] + token).long()
    keys, values = (
        x.tensor[:, rows[:, None], place] for x in (state.window.keys, state.window.values)
    )
    mean = None
    if state.key_mean is not None:
        of_first = pre_rope.mean_key(keys, state.phases)
        opens = (complete & (first == 0))[None, :, None, None]
        mean = torch.where(opens, of_first, state.key_mean[:, rows])
        state.key_mean.index_copy_(1, rows, mean)
    for part in state.parts:
        own = [x[part.layer, :, :, part.head].permute(1, 2, 0, 3) for x in (keys, values)]
        centre = None if mean is None else mean[part.layer, :, part.head].transpose(0, 1)
        page = torch.where(complete, page, -1)
        store_blocks(state, part, slice(None), own, centre, first, page, by.search)


def compress_chunk(
    state: State, layer: int, k: Tensor, v: Tensor, by: Compression = DEFINITION
) -> None:
    """Compress what sequences with more pending tokens completed, in one layer.

    k, v [B, T, K, H] are the chunk, which enters the window only after this.
    """
    table, layout, config = state.table, state.layout, state.config
    slot, filled = layout.completed(table.lengths, table.pending, k.shape[1])
    filled = filled & (table.pending > 1)[:, None]
    page = torch.gather(table.pending_pages, 1, slot.long())
    count = slot.shape[1]
    first = config.num_blocks(table.lengths)
    opens = (first == 0) & filled.any(dim=1)
    number = first[:, None] + torch.arange(count, dtype=torch.int32, device=state.device)
    block = [_gather(state, layer, i, new, count) for i, new in enumerate((k, v))]
    if by.kernels:
        from turboquant_jax.pytorch import kernels

        kernels.encode_chunk(state, layer, block, torch.where(filled, page, -1), number)
        return
    mean = None
    if state.key_mean is not None:
        of_first = pre_rope.mean_key(block[0][:, 0], state.phases)
        mean = torch.where(opens[:, None, None], of_first, state.key_mean[layer])
        state.key_mean[layer] = mean
        mean = mean[:, None].expand(-1, count, -1, -1).flatten(0, 1)
    page, number = torch.where(filled, page, -1).flatten(), number.flatten()
    for member in state.members[layer]:
        heads = list(member.heads)
        own = [x.flatten(0, 1)[:, :, heads] for x in block]
        centre = None if mean is None else mean[:, heads]
        part = state.parts[member.part]
        store_blocks(state, part, member.rows, own, centre, number, page, by.search)


def store_blocks(
    state: State,
    part: Part,
    rows: slice,
    block: list[Tensor],
    mean: Tensor | None,
    number: Tensor,
    page: Tensor,
    search: Search,
) -> None:
    """Encode blocks `number` [n], keys and values [n, T, rows, H] with means [n, rows, H], into
    pages [n]; a negative one is nowhere.
    """
    keys, values = block
    if mean is not None:
        token = torch.arange(keys.shape[1], dtype=torch.int32, device=state.device)
        index = number[:, None] * keys.shape[1] + token
        keys = pre_rope.center(keys, mean, state.phases, index)
    key, value = (
        codec.quantize(rows, x, search)
        for codec, x in zip(part.codecs, (keys, values), strict=True)
    )
    row = torch.arange(len(part.heads), device=state.device)[rows]
    index = page[:, None] + row * part.pool.scales[0].lead[1]
    kept = (page >= 0)[:, None].expand(index.shape)
    packed = [
        (plane, group.constants.plane_widths, own[0].movedim(*axes))
        for side, codec, codes, axes in (
            (part.pool.keys, part.codecs[0], key, (1, 2)),
            (part.pool.values, part.codecs[1], value, (1, 3)),
        )
        for plane, group, own in zip(side, codec.groups, codes, strict=True)
    ]
    for planes, widths, indices in packed:
        for plane, new in zip(planes, packing.pack(indices, widths), strict=True):
            plane.put(index, kept, new)
    for number_, words in enumerate(part.pool.scales):
        scales = [
            own[number_][1].transpose(1, 2) if number_ < codec.scale_count else None
            for codec, own in zip(part.codecs, (key, value), strict=True)
        ]
        words.put(index, kept, packing.scale_words(*scales))


def _gather(state: State, layer: int, side: int, chunk: Tensor, count: int) -> Tensor:
    """The next `count` blocks [B, count, block, K, H] of each sequence, from window and chunk."""
    config, layout, lengths = state.config, state.layout, state.table.lengths
    window = (state.window.keys, state.window.values)[side].tensor[layer]
    start = layout.block_start(config.num_blocks(lengths))
    token = torch.arange(count * config.block, dtype=torch.int32, device=state.device)
    position = start[:, None] + token
    in_chunk = position - lengths[:, None]
    row = torch.arange(state.batch, device=state.device)[:, None]
    late = chunk[row, in_chunk.clamp(0, chunk.shape[1] - 1).long()]
    early = window[row, layout.window_slot(position).long()]
    found = torch.where((in_chunk >= 0)[..., None, None], late, early)
    return found.unflatten(1, (count, config.block))
