"""A torch cache as the GPU kernels take it: `attention.triton` and `cache.encoding` in torch.

Everything is passed as it lies in the cache, a layer as a view of it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pallas_kernels.primitives.period import PERIOD
from turboquant_jax.pytorch import operands, operators, pre_rope
from turboquant_jax.pytorch.codec import Codec, Group, grid_of
from turboquant_jax.pytorch.segments import Scores
from turboquant_jax.pytorch.state import Member, Part, State

_MADE: WeakKeyDictionary[Any, dict] = WeakKeyDictionary()  # of owners, see `_once`


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
    (member,) = state.members[layer]
    part = state.parts[member.part]
    query = heads[0][:, 0].contiguous()
    new = [x.to(state.window.keys.storage.dtype).contiguous() for x in heads[1:]]
    key_codec, value_codec = part.codecs
    plain = value_codec.order is None and all(g.matrix is None for g in value_codec.groups)
    output, _ = operators.decode_attention(
        _rotated(key_codec, member, query),
        operands.PagedBlocks(
            groups=groups_of(part, member.rows),
            page_table=state.table.page_table,
            lengths=state.table.lengths,
            row=None,
            kv_heads=state.config.num_kv_heads,
        ),
        operands.Softmax(
            scale=scores.factor(state.config.head_dim),
            soft_cap=scores.softcap,
            sink_logits=sink_logits,
        ),
        exact=_exact(state, layer, query, new),
        rotation=None if plain else of_codec(value_codec, member),
        dtype=query.dtype,
    )
    return output[:, None]


def trellis_search(y: Tensor, levels: Tensor, numbers: tuple[float, ...]) -> Tensor:
    """`trellis.encode` by the kernel, of levels that are known beforehand."""
    rows = y.reshape(-1, y.shape[-1]).T.contiguous()
    return operators.trellis_encode(rows, numbers).T.reshape(y.shape)


def encode_window(state: State, start: Tensor, page: Tensor, number: Tensor) -> None:
    """Compress a block of each sequence's window, in all layers; see `cache.encoding`."""
    batch, heads = state.batch, state.config.num_kv_heads
    source = [_flat(x.tensor) for x in (state.window.keys, state.window.values)]
    for part in state.parts:
        layers = _once(part, "layers", partial(_layers, part))
        rows = layers * batch + torch.arange(batch, device=state.device)[None, :]
        first = heads * torch.arange(layers.shape[0], device=state.device)[:, None]
        columns = rows, start[None], _through_rows(state, first, page[None]), rows, number[None]
        _encode_jobs(state, part, source, columns)


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
        _encode_jobs(state, part, source, [column[:, some] for column in columns])


def groups_of(part: Part, rows: slice) -> tuple[operands.Operand, ...]:
    """The blocks of some rows, as the kernels read them."""
    pool, found = part.pool, []
    for g, (key, value) in enumerate(zip(*(codec.groups for codec in part.codecs), strict=True)):
        found.append(
            operands.BlocksOperand(
                keys=tuple(plane.tensor[rows] for plane in pool.keys[g]),
                values=tuple(plane.tensor[rows] for plane in pool.values[g]),
                scales=pool.scales[g].tensor[rows].view(torch.uint32),
                key_codebook=_codebook(key),
                value_codebook=_codebook(value),
            )
        )
    return tuple(found)


def of_codec(codec: Codec, member: Member) -> operands.Operand:
    """The whole rotation of the heads of a member, in bfloat16 parts."""

    def make() -> operands.Operand:
        if len(codec.groups) == 1 and codec.order is None:
            return _of_group(codec.groups[0], torch.bfloat16)
        matrix = torch.block_diag(*map(_matrix, codec.groups))[None]
        if codec.inverse is not None:
            matrix = torch.stack([matrix[0][:, order] for order in codec.inverse[member.rows]])
        return operands.RotationOperand(parts=_split(matrix), signs=None, gain=1.0)

    whole = member.rows if codec.order is not None else None
    return _once(codec, ("rotation", None if whole is None else whole.start), make)


def _exact(state: State, layer: int, query: Tensor, new: list[Tensor]) -> operands.Operand:
    layout, config = state.layout, state.config
    held = [segment for segment in (state.sinks, state.window) if segment.keys.lead[2]]
    phases = state.phases
    return operands.ExactOperand(
        query=query,
        keys=(*(segment.keys.tensor[layer] for segment in held), new[0]),
        values=(*(segment.values.tensor[layer] for segment in held), new[1]),
        pending=state.table.pending,
        places=operands.Places(
            sinks=config.sinks,
            window=config.window,
            block=config.block,
            sliding_window=config.sliding_window,
            sink_slots=layout.sinks,
            ring=layout.ring,
            slots=layout.slots,
        ),
        key_mean=None if state.key_mean is None else state.key_mean[layer],
        phases=None if phases is None else _once(phases, "operand", lambda: _of_phases(phases)),
        write=True,
        layer=None,
    )


def _encode_jobs(state: State, part: Part, source: list[Tensor], columns: Any) -> None:
    """Jobs (row, slot, page, mean, block of the sequence), as columns of one shape."""
    row, slot, page, mean, number = (
        column.to(torch.int32).flatten() for column in torch.broadcast_tensors(*columns)
    )
    index = number * state.config.block
    jobs = torch.stack([row, slot, page, mean, (index == 0).int(), index % PERIOD], dim=1)
    dtype = source[0].dtype
    keys = _targets(part.codecs[0], part.pool.keys, dtype)
    before_rope, rotated_mean = None, None
    if state.key_mean is not None:
        if state.phases is None:
            rotated_mean = operators.rotated_means(_flat(state.key_mean), keys)
        else:
            before_rope = _pre_rope(state, index, mean)
    pool = operands.Pool(
        keys=keys,
        values=_targets(part.codecs[1], part.pool.values, dtype),
        scales=tuple(words.tensor.view(torch.uint32) for words in part.pool.scales),
        key_mean=None if state.key_mean is None else _flat(state.key_mean),
        pre_rope=before_rope,
        rotated_mean=rotated_mean,
    )
    operators.encode(*source, jobs, pool)


def _pre_rope(state: State, index: Tensor, mean: Tensor) -> operands.Operand:
    """The mean of each job, turned to its periods."""
    phases, block = state.phases, state.config.block
    assert phases is not None and state.key_mean is not None

    def tables() -> tuple[Tensor, Tensor]:
        token = torch.arange(block, dtype=torch.int32, device=state.device)
        halves = [table.to(torch.float32).chunk(2, dim=-1) for table in phases.at(token)]
        coarse, fine, within = (torch.complex(*pair) for pair in halves)
        whole = coarse * fine * within
        opening = torch.cat([whole.real, whole.imag], dim=-1)
        return _signed(phases.within, phases.rotary), _signed(opening, phases.rotary)

    angles, opening = _once(phases, ("tables", block), tables)
    periods = torch.arange(-(-block // PERIOD), dtype=torch.int32, device=state.device)
    period = (index // PERIOD)[:, None] + periods
    turned = pre_rope.mean_of_period(_flat(state.key_mean)[mean.long()], phases, period)
    turned = turned.flatten(0, 1)
    first, second = pre_rope.split_pairs(turned, phases.rotary)
    swapped = pre_rope.join_pairs(second, first, phases.rotary)
    return operands.PreRopeOperand(
        angles=angles,
        opening=opening,
        turned=torch.stack([turned, swapped], dim=2),
        rotary=phases.rotary,
    )


def _signed(angles: Tensor, rotary: int) -> Tensor:
    """[rows, 2, H]: the cosine of each channel's pair, and its sine, negative for the first."""
    cos, sin = angles.chunk(2, dim=1)
    join = pre_rope.join_pairs
    return torch.stack([join(cos, cos, rotary), join(-sin, sin, rotary)], dim=1)


def _of_phases(phases: pre_rope.Phases) -> operands.Operand:
    pairs = torch.stack(phases.within.chunk(2, dim=1), dim=-1)
    within = pairs.reshape(phases.within.shape).to(torch.int8)
    return operands.PhasesOperand(
        coarse=phases.coarse, fine=phases.fine, within=within, rotary=phases.rotary
    )


def _targets(codec: Codec, planes: Any, dtype: torch.dtype) -> tuple[operands.Operand, ...]:
    return tuple(
        operands.GroupOperand(
            planes=tuple(plane.tensor for plane in own),
            rotation=_once(group, ("folded", dtype), partial(_folded, group, dtype)),
            code=operands.CodeOperand(levels=group.constants.levels, scale=group.constants.scale),
        )
        for group, own in zip(codec.groups, planes, strict=True)
    )


def _of_group(group: Group, dtype: torch.dtype) -> operands.Operand:
    """One rotation for vectors of this dtype: exact in bfloat16, in float32 for all others."""
    matrix = _matrix(group)
    if group.signs is not None:
        pattern = torch.sign(matrix * group.signs).to(dtype)
        gain = group.constants.rotation.block**-0.5
        return operands.RotationOperand(parts=pattern[None, None], signs=group.signs, gain=gain)
    parts = matrix[None, None] if dtype == torch.float32 else _split(matrix[None])
    return operands.RotationOperand(parts=parts, signs=None, gain=1.0)


def _layers(part: Part) -> Tensor:
    return part.layer[part.head == 0][:, None]


def _matrix(group: Group) -> Tensor:
    if group.matrix is not None:
        return group.matrix
    return torch.eye(group.constants.dim, device=group.levels.device)


def _folded(group: Group, dtype: torch.dtype) -> operands.Operand:
    """The same with the signs in the matrix."""
    found = _of_group(group, dtype if dtype == torch.bfloat16 else torch.float32)
    if found.signs is None:
        return found
    parts = found.parts * found.signs.to(found.parts.dtype)
    return operands.RotationOperand(parts=parts, signs=None, gain=found.gain)


def _split(matrix: Tensor) -> Tensor:
    """float32 [heads, H, H] as the sum of three bfloat16 parts [3, heads, H, H]."""
    parts, rest = [], matrix
    for _ in range(3):
        parts.append(rest.to(torch.bfloat16))
        rest = rest - parts[-1].to(torch.float32)
    return torch.stack(parts)


def _rotated(codec: Codec, member: Member, query: Tensor) -> Tensor:
    """One query per sequence [B, N, H] in the rotated space of the keys, float32."""
    if query.dtype == torch.bfloat16:
        return operators.rotate(query, of_codec(codec, member))
    grouped = query.unflatten(1, (len(member.heads), -1)).transpose(1, 2)
    return codec.rotate_query(member.rows, grouped).transpose(1, 2).flatten(1, 2).contiguous()


def _codebook(group: Group) -> operands.Operand:
    constants, grid = group.constants, grid_of(group)
    assert grid is not None  # `choose` looked
    return operands.CodebookOperand(
        bits=constants.bits, levels=grid[0], step=grid[1], code=constants.code
    )


def _through_rows(state: State, row: Tensor, page: Tensor) -> Tensor:
    """Pages of a row, counted through the rows before it; negative ones as they are."""
    return torch.where(page < 0, page, page + row * state.table.references.shape[0])


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def _once(owner: Any, name: Any, make: Callable[[], Any]) -> Any:
    """What is made once for as long as its owner lives."""
    own = _MADE.setdefault(owner, {})
    if name not in own:
        own[name] = make()
    return own[name]
