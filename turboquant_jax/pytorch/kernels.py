"""A torch cache as the GPU kernels take it: `attention.triton` and `cache.encoding` in torch.

Everything is passed as it lies in the cache, a layer as a view of it.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from pallas_kernels.primitives.period import PERIOD
from turboquant_jax.pytorch import kernel_operands, operands, operators, pre_rope
from turboquant_jax.pytorch.codec import Codec
from turboquant_jax.pytorch.pre_rope import Phases
from turboquant_jax.pytorch.segments import Scores
from turboquant_jax.pytorch.state import Part, State


def attend_and_write(
    state: State,
    layer: int,
    heads: tuple[Tensor, Tensor, Tensor],
    scores: Scores,
    sink_logits: Tensor | None,
) -> Tensor:
    """Attention of one query per sequence over a layer and the new token, which is written.

    Queries [B, 1, N, H], keys and values [B, 1, K, H]; the output has the dtype of the queries.
    """
    query = heads[0][:, 0].contiguous()
    new = [x.to(state.window.keys.storage.dtype).contiguous() for x in heads[1:]]
    values = codecs_of(state, layer, 1)
    turned = any(codec.order is not None or codec.transform is not None for codec in values)
    turned = turned or any(group.matrix is not None for codec in values for group in codec.groups)
    output, _ = operators.decode_attention(
        _rotated(state, layer, query),
        _paged(state, layer),
        operands.Softmax(
            scale=scores.factor(state.config.head_dim),
            soft_cap=scores.softcap,
            sink_logits=sink_logits,
        ),
        exact=_exact(state, layer, query, new),
        rotation=kernel_operands.of_layer(state, layer, 1) if turned else None,
        dtype=query.dtype,
    )
    return output[:, None]


def codecs_of(state: State, layer: int, side: int) -> list[Codec]:
    """Those of the keys (0), or of the values (1), of each format of a layer."""
    return [state.parts[member.part].codecs[side] for member in state.members[layer]]


def trellis_search(y: Tensor, levels: Tensor, numbers: tuple[float, ...]) -> Tensor:
    """`trellis.encode` by the kernel, of levels that are known beforehand."""
    rows = y.reshape(-1, y.shape[-1]).T.contiguous()
    return operators.trellis_encode(rows, numbers).T.reshape(y.shape)


def encode_window(state: State, start: Tensor, page: Tensor, number: Tensor) -> None:
    """Compress a block of each sequence's window, in all layers; see `cache.encoding`."""
    batch, heads = state.batch, state.config.num_kv_heads
    source = [_flat(x.tensor) for x in (state.window.keys, state.window.values)]
    for part in state.parts:
        layers = kernel_operands.once(part, "layers", partial(_layers, part))
        rows = layers * batch + torch.arange(batch, device=state.device)[None, :]
        first = heads * torch.arange(layers.shape[0], device=state.device)[:, None]
        columns = rows, start[None], _through_rows(state, first, page[None]), rows, number[None]
        encode_jobs(state, part, source, columns)


def encode_chunk(
    state: State, layer: int, block: list[Tensor], page: Tensor, number: Tensor
) -> None:
    """Compress blocks [B, n, T, K, H] of each sequence, in one layer, into pages [B, n]."""
    (member,) = state.members[layer]
    part, (batch, count) = state.parts[member.part], page.shape
    source = [x.flatten(1, 2).contiguous() for x in block]
    row = torch.arange(batch, device=state.device)[:, None]
    start = state.config.block * torch.arange(count, device=state.device)[None, :]
    page = _through_rows(state, torch.full_like(row, member.rows.start), page)
    columns = torch.broadcast_tensors(row, start, page, layer * batch + row, number)
    # a sequence's first block alone: the kernel takes its mean, which the next ones need
    for some in (slice(1), slice(1, None))[:count]:
        encode_jobs(state, part, source, [column[:, some] for column in columns])


def _paged(state: State, layer: int) -> operands.Operand:
    """The blocks of a layer; heads of several formats have a pool, a row there and a number."""
    members = state.members[layer]
    pools = tuple(kernel_operands.blocks_of(state.parts[m.part], m.rows) for m in members)
    table = dict(page_table=state.table.page_table, lengths=state.table.lengths, row=None)
    if len(members) == 1:
        return operands.PagedBlocks(pools=pools, kv_heads=state.config.num_kv_heads, **table)

    def places() -> Tensor:
        found = [(i, row, head) for i, m in enumerate(members) for row, head in enumerate(m.heads)]
        return torch.tensor(found, device=state.device).int()

    heads = kernel_operands.once(state, ("places", layer), places)
    return operands.PagedBlocks(pools=pools, kv_heads=None, heads=heads, **table)


def _exact(state: State, layer: int, query: Tensor, new: list[Tensor]) -> operands.Operand:
    held = [segment for segment in (state.sinks, state.window) if segment.keys.lead[2]]
    phases = state.phases
    return operands.ExactOperand(
        query=query,
        keys=(*(segment.keys.tensor[layer] for segment in held), new[0]),
        values=(*(segment.values.tensor[layer] for segment in held), new[1]),
        pending=state.table.pending,
        places=operands.places_of(state.layout),
        key_mean=None if state.key_mean is None else state.key_mean[layer],
        phases=None
        if phases is None
        else kernel_operands.once(phases, "operand", lambda: kernel_operands.of_phases(phases)),
        write=True,
        layer=None,
    )


def encode_jobs(state: State, part: Part, source: list[Tensor], columns: Any) -> None:
    """Jobs (row, slot, page, mean, block of the sequence), as columns of one shape."""
    row, slot, page, mean, number = (
        column.to(torch.int32).flatten() for column in torch.broadcast_tensors(*columns)
    )
    index = number * state.config.block
    jobs = torch.stack([row, slot, page, mean, (index == 0).int(), index % PERIOD], dim=1)
    key_mean, turned = state.key_mean, None
    if key_mean is not None:
        key_mean = _flat(key_mean)
        if state.phases is not None:
            turned = turned_means(key_mean[mean.long()], state.phases, index, state.config.block)
    encode(part, source, jobs, key_mean, state.phases, turned)


def encode(
    part: Part,
    source: list[Tensor],
    jobs: Tensor,
    key_mean: Tensor | None,
    phases: Phases | None,
    turned: Tensor | None,
) -> None:
    """Jobs int32 [n, 6] of the encode kernel; `turned`: of a mean before RoPE."""
    dtype, block = source[0].dtype, part.pool.scales[0].storage.shape[1]
    keys = _targets(part.codecs[0], part.pool.keys, dtype)
    before_rope, rotated_mean = None, None
    if turned is not None:
        assert phases is not None
        angles, opening = _tables(phases, block)
        before_rope = operands.PreRopeOperand(
            angles=angles, opening=opening, turned=turned, rotary=phases.rotary
        )
    elif key_mean is not None:
        rotated_mean = operators.rotated_means(key_mean, keys)
    pool = operands.Pool(
        keys=keys,
        values=_targets(part.codecs[1], part.pool.values, dtype),
        scales=tuple(words.tensor.view(torch.uint32) for words in part.pool.scales),
        key_mean=key_mean,
        pre_rope=before_rope,
        rotated_mean=rotated_mean,
    )
    operators.encode(*source, jobs, pool)


def turned_means(mean: Tensor, phases: Phases, index: Tensor, block: int) -> Tensor:
    """[*lead, n * periods, K, 2, H]: means [*lead, n, K, H] of blocks that begin at `index` [n]."""
    periods = torch.arange(-(-block // PERIOD), dtype=torch.int32, device=mean.device)
    period = (index // PERIOD)[:, None] + periods
    period = period.expand(*mean.shape[:-2], periods.shape[0])
    turned = pre_rope.mean_of_period(mean, phases, period).flatten(-4, -3)
    first, second = pre_rope.split_pairs(turned, phases.rotary)
    swapped = pre_rope.join_pairs(second, first, phases.rotary)
    return torch.stack([turned, swapped], dim=-2)


def _tables(phases: Phases, block: int) -> tuple[Tensor, Tensor]:
    """Angles of a period, and those of a sequence's first block."""

    def make() -> tuple[Tensor, Tensor]:
        token = torch.arange(block, dtype=torch.int32, device=phases.within.device)
        halves = [table.to(torch.float32).chunk(2, dim=-1) for table in phases.at(token)]
        coarse, fine, within = (torch.complex(*pair) for pair in halves)
        whole = coarse * fine * within
        opening = torch.cat([whole.real, whole.imag], dim=-1)
        return _signed(phases.within, phases.rotary), _signed(opening, phases.rotary)

    return kernel_operands.once(phases, ("tables", block), make)


def _signed(angles: Tensor, rotary: int) -> Tensor:
    """[rows, 2, H]: the cosine of each channel's pair, and its sine, negative for the first."""
    cos, sin = angles.chunk(2, dim=1)
    join = pre_rope.join_pairs
    return torch.stack([join(cos, cos, rotary), join(-sin, sin, rotary)], dim=1)


def _targets(codec: Codec, planes: Any, dtype: torch.dtype) -> tuple[operands.Operand, ...]:
    return tuple(
        operands.GroupOperand(
            planes=tuple(plane.tensor for plane in own),
            rotation=kernel_operands.once(
                group, ("folded", dtype), partial(kernel_operands.folded, group, dtype)
            ),
            code=operands.CodeOperand(levels=group.constants.levels, scale=group.constants.scale),
        )
        for group, own in zip(codec.groups, planes, strict=True)
    )


def _layers(part: Part) -> Tensor:
    return part.layer[part.head == 0][:, None]


def _rotated(state: State, layer: int, query: Tensor) -> Tensor:
    """One query per sequence [B, N, H] in the rotated space of the keys, float32."""
    if query.dtype == torch.bfloat16:
        return operators.rotate(query, kernel_operands.of_layer(state, layer, 0))
    grouped = query.unflatten(1, (state.config.num_kv_heads, -1)).transpose(1, 2)  # [B, G, K, H]
    found = torch.empty_like(grouped, dtype=torch.float32)
    for member, codec in zip(state.members[layer], codecs_of(state, layer, 0), strict=True):
        for row, head in enumerate(member.heads):
            rows = slice(member.rows.start + row, member.rows.start + row + 1)
            found[:, :, head : head + 1] = codec.rotate_query(rows, grouped[:, :, head : head + 1])
    return found.transpose(1, 2).flatten(1, 2).contiguous()


def _through_rows(state: State, row: Tensor, page: Tensor) -> Tensor:
    """Pages of a row, counted through the rows before it; negative ones as they are."""
    return torch.where(page < 0, page, page + row * state.table.references.shape[0])


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, 1)
