"""Attention over one segment of tokens, and the rule that joins segments: `attention.segments`.

What is not finite is never lost: the rules of that module hold here too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SegmentPart = tuple[Tensor, Tensor]
"""Normalised outputs [B, T, N, H] and log-sum-exps [B, T, N], float32."""


@dataclass(frozen=True)
class Scores:
    """How scores come from products; see `attention.segments.Scores`."""

    scale: float | None = None
    softcap: float | None = None

    def factor(self, head_dim: int) -> float:
        """What multiplies the products."""
        return head_dim**-0.5 if self.scale is None else self.scale

    def of(self, products: Tensor, head_dim: int) -> Tensor:
        """Scores of float32 products."""
        scores = products * self.factor(head_dim)
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)


def merge(parts: Sequence[SegmentPart]) -> SegmentPart:
    """Join the outputs of disjoint sets of tokens by their log-sum-exp (-inf for an empty set)."""
    total = parts[0][1]
    for _, lse in parts[1:]:
        total = torch.logaddexp(total, lse)
    output = torch.zeros_like(parts[0][0])
    for part, lse in parts:
        empty = torch.isneginf(lse)
        weight = torch.where(empty, 0.0, torch.exp(lse - total))
        output = output + weight[..., None] * torch.where(empty[..., None], 0.0, part)
    return output, total


def attend_segment(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scores: Scores, bias: Tensor | None = None
) -> SegmentPart:
    """Softmax attention of q [B, T, N, H] over k, v [B, S, K, H] where visible [B, T, S], float32.

    `bias` [B, T, N, S or 1] is added to the products before they are scaled. A query that sees
    nothing gives 0, -inf.
    """
    batch, count, heads, dim = q.shape
    grouped = q.to(torch.float32).reshape(batch, count, k.shape[2], -1, dim)
    products = torch.einsum("btkgh,bskh->bkgts", grouped, k.to(torch.float32))
    if bias is not None:
        products = products + bias.unflatten(2, (k.shape[2], -1)).movedim(1, 3)
    logits = scores.of(products, dim)
    logits = torch.where(torch.isfinite(products) & torch.isfinite(logits), logits, torch.nan)
    logits = torch.where(visible[:, None, None], logits, -torch.inf)
    lse = torch.logsumexp(logits, dim=-1)
    weight = torch.exp(logits - torch.where(torch.isneginf(lse), 0.0, lse)[..., None])
    # 0 * NaN is NaN: of what a query does not see, nothing may enter its sum
    finite = torch.isfinite(v)
    output = torch.einsum(
        "bkgts,bskh->btkgh", weight, torch.where(finite, v.to(torch.float32), 0.0)
    )
    spoilt = torch.einsum("bts,bskh->btkh", visible.to(torch.float32), (~finite).to(torch.float32))
    output = torch.where(spoilt[:, :, :, None] > 0, torch.nan, output)
    return output.reshape(q.shape), lse.movedim(3, 1).reshape(batch, count, heads)
