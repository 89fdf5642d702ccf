"""Tensors of a torch cache as the kernels take them: `cache.kernel_operands` in torch."""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from turboquant_jax.pytorch import operands, pre_rope
from turboquant_jax.pytorch.codec import Codec, Group, grid_of
from turboquant_jax.pytorch.state import Member, Part, State

_MADE: WeakKeyDictionary[Any, dict] = WeakKeyDictionary()  # of owners, see `once`


def blocks_of(part: Part, rows: slice) -> operands.Operand:
    """The blocks of some rows, as the kernels read them."""
    pool = part.pool
    key, value = (tuple(map(_codebook, codec.groups)) for codec in part.codecs)

    def planes(groups: Any) -> tuple[tuple[Tensor, ...], ...]:
        return tuple(tuple(plane.tensor[rows] for plane in own) for own in groups)

    return operands.BlocksOperand(
        keys=planes(pool.keys),
        values=planes(pool.values),
        scales=tuple(words.tensor[rows].view(torch.uint32) for words in pool.scales),
        key_codebooks=key,
        value_codebooks=value,
        joint=tuple(codec.transform is not None for codec in part.codecs),
    )


def of_codec(codec: Codec, member: Member) -> operands.Operand:
    """The whole rotation of the heads of a member in bfloat16 parts, of queries or for outputs."""
    rows = member.rows

    def make() -> operands.Operand:
        if codec.transform is not None:
            return operands.RotationOperand(parts=_split(codec.transform.dual[rows]), signs=None)
        if len(codec.groups) == 1 and codec.order is None:
            return of_group(codec.groups[0], torch.bfloat16)
        matrix = torch.block_diag(*map(_matrix, codec.groups))[None]
        if codec.inverse is not None:
            matrix = torch.stack([matrix[0][:, order] for order in codec.inverse[rows]])
        return operands.RotationOperand(parts=_split(matrix), signs=None)

    of_each = codec.order is not None or codec.transform is not None
    return once(codec, ("rotation", rows.start if of_each else None), make)


def of_layer(state: State, layer: int, side: int) -> operands.Operand:
    """`of_codec` of all heads of a layer, be they of one format or of several."""
    members = state.members[layer]
    codecs = [state.parts[member.part].codecs[side] for member in members]
    if len(members) == 1:
        return of_codec(codecs[0], members[0])

    def make() -> operands.Operand:
        matrices = {}
        for codec, member in zip(codecs, members, strict=True):
            own = of_codec(codec, member)
            signs = 1.0 if own.signs is None else own.signs
            # exact: three parts of 8 bits of a mantissa are one of 24
            whole = own.parts.float().sum(dim=0) * (signs * own.fields.get("gain", 1.0))
            for row, head in enumerate(member.heads):
                matrices[head] = whole[row % whole.shape[0]]
        stacked = torch.stack([matrices[head] for head in sorted(matrices)])
        return operands.RotationOperand(parts=_split(stacked), signs=None)

    return once(state, ("rotation", layer, side), make)


def of_phases(phases: pre_rope.Phases) -> operands.Operand:
    """The tables of a cache; those of a period in bytes, cosine and sine of a pair side by side."""
    pairs = torch.stack(phases.within.chunk(2, dim=1), dim=-1)
    within = pairs.reshape(phases.within.shape).to(torch.int8)
    return operands.PhasesOperand(
        coarse=phases.coarse, fine=phases.fine, within=within, rotary=phases.rotary
    )


def folded(group: Group, dtype: torch.dtype) -> operands.Operand:
    """The same with the signs in the matrix."""
    found = of_group(group, dtype if dtype == torch.bfloat16 else torch.float32)
    if found.signs is None:
        return found
    parts = found.parts * found.signs.to(found.parts.dtype)
    return operands.RotationOperand(parts=parts, signs=None, gain=found.gain)


def of_group(group: Group, dtype: torch.dtype) -> operands.Operand:
    """One rotation for vectors of this dtype: exact in bfloat16, in float32 for all others."""
    matrix = _matrix(group)
    if group.signs is not None:
        pattern = torch.sign(matrix * group.signs).to(dtype)
        gain = group.constants.rotation.block**-0.5
        return operands.RotationOperand(parts=pattern[None, None], signs=group.signs, gain=gain)
    parts = matrix[None, None] if dtype == torch.float32 else _split(matrix[None])
    return operands.RotationOperand(parts=parts, signs=None, gain=1.0)


def _split(matrix: Tensor) -> Tensor:
    """float32 [heads, H, H] as the sum of three bfloat16 parts [3, heads, H, H]."""
    parts, rest = [], matrix
    for _ in range(3):
        parts.append(rest.to(torch.bfloat16))
        rest = rest - parts[-1].to(torch.float32)
    return torch.stack(parts)


def _matrix(group: Group) -> Tensor:
    if group.matrix is not None:
        return group.matrix
    return torch.eye(group.constants.dim, device=group.levels.device)


def _codebook(group: Group) -> operands.Operand:
    constants, grid = group.constants, grid_of(group)
    assert grid is not None  # `choose` looked
    return operands.CodebookOperand(
        bits=constants.bits, levels=grid[0], step=grid[1], code=constants.code
    )


def once(owner: Any, name: Any, make: Callable[[], Any]) -> Any:
    """What is made once for as long as its owner lives."""
    own = _MADE.setdefault(owner, {})
    if name not in own:
        own[name] = make()
    return own[name]
