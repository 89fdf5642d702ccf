"""The trellis code of `quantizers.trellis` in torch: the same search, step by step."""

from functools import cache, reduce

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_STATES = 8  # state = u[t-1] + 2 u[t-2] + 4 u[t-3]


def _branches() -> np.ndarray:
    """[u3, u1 + 2 u2, u]: the subset 2 c1 + c0 that bit u selects after the bits u3, u2, u1."""
    u3, u2, u1, u = np.ogrid[:2, :2, :2, :2]
    return (2 * (u ^ u1 ^ u3) + u2).reshape(2, 4, 2)


@cache
def _branch(device: torch.device) -> Tensor:
    return torch.from_numpy(_branches()).to(device)


def encode(y: Tensor, table: Tensor) -> Tensor:
    """Indices uint8 of the paths of least squared error; y float32 [*batch, d].

    `table`: 2^(R+1) sorted levels, float32. Ties as in `quantizers.trellis.encode`.
    """
    rows = y.reshape(-1, y.shape[-1]).T.contiguous()
    bits = _trace_back(*_search(rows, table)).T.reshape(y.shape)
    return join(y, bits, table)


def search(y: Tensor, table: Tensor, levels: tuple[float, ...]) -> Tensor:
    """`encode`; the same levels as numbers are for kernels."""
    return encode(y, table)


def join(y: Tensor, trellis_bits: Tensor, table: Tensor) -> Tensor:
    """Indices of a path: its bits, and the nearest level of the subset that they select."""
    subset = _subsets(trellis_bits).long()
    midpoints = (table[4:] + table[:-4]).view(-1, 4) / 2
    level = torch.zeros_like(trellis_bits)
    for row in midpoints:
        level = level + (y > row[subset]).to(torch.uint8)
    return level | (trellis_bits << (table.shape[0].bit_length() - 3))


def level_numbers(indices: Tensor, bits: int) -> Tensor:
    """Which of the 2^(bits+1) sorted levels every index stands for, int64."""
    within = (indices & ((1 << (bits - 1)) - 1)).long()
    return 4 * within + _subsets((indices >> (bits - 1)) & 1).long()


def _subsets(bits: Tensor) -> Tensor:
    """2 c1 + c0 of every coordinate."""

    def delayed(steps: int) -> Tensor:
        return F.pad(bits, (steps, 0))[..., : bits.shape[-1]]

    return ((bits ^ delayed(1) ^ delayed(3)) << 1) | delayed(2)


def _search(rows: Tensor, table: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Costs [states, vectors] of the best path into every end state; of every coordinate a byte,
    whose bit s is u3 of the best path into state s.
    """
    rungs = table.view(-1, 4, 1)  # [w, subset]
    branch = _branch(rows.device)
    place = torch.arange(_STATES, dtype=torch.uint8, device=rows.device)[:, None]
    cost = torch.full((_STATES, rows.shape[1]), torch.inf, device=rows.device)
    cost[0] = 0.0
    bytes_ = []
    for y in rows:
        subset_cost = reduce(torch.minimum, [torch.square(y[None] - rung) for rung in rungs])
        # see quantizers.trellis: with the new bit as the fastest axis, this is the new state
        zero, one = cost.view(2, _STATES // 2, 1, -1) + subset_cost[branch]
        survivor = (one < zero).view(_STATES, -1).to(torch.uint8)
        bytes_.append((survivor << place).sum(dim=0, dtype=torch.uint8))
        cost = torch.minimum(zero, one).view(_STATES, -1)
    return cost, bytes_


def _trace_back(cost: Tensor, survivors: list[Tensor]) -> Tensor:
    """The best path's trellis bits [d, vectors], found from its end."""
    state = torch.argmin(cost, dim=0).to(torch.uint8)
    bits = []
    for byte in reversed(survivors):
        bits.append(state & 1)
        state = (state >> 1) | (((byte >> state) & 1) << 2)
    return torch.stack(bits[::-1])
