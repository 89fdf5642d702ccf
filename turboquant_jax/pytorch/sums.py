"""Sums in the order of `quantizers.quantizer.ordered_sum`: torch and JAX store the same bits."""

import torch
from torch import Tensor


def ordered_sum(x: Tensor) -> Tensor:
    """Over the last axis [*batch, n], by halves, which no shape changes."""
    while (count := x.shape[-1]) > 1:
        first, last = x[..., : count // 2], x[..., -(count // 2) :]
        middle = x[..., count // 2 : count - count // 2]  # of an odd number
        x = torch.cat([first + last, middle], dim=-1)
    return x.sum(dim=-1)  # of one, or of none
