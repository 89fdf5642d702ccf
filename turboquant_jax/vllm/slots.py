"""A place on the device for the open block of every running request, found there by its page.

vLLM says which pages a request has, not which request has them; rows of a batch change from step to
step. An open block, which is not full, belongs to one request, so that its page names the request.
`Slots` keeps a slot for each such page, and gives out the slot that was used longest ago.

That one is never in use. Of the requests that run, at most `count`, each has at most one slot. One
that is not part of a step was left out because the tokens of the step were spent on requests before
it; then none is admitted either. So slots used since, or with it, are those of others that already
ran with it, and with `count` slots there is one that was used before.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Slots:
    """Slots 0 to count - 1; slot `count` is where what belongs nowhere goes.

    Attributes:
      count: most requests that run at a time.
      of_page: int32 [pages], the slot of a page whose block is open.
      used: int64 [count + 1], the step in which a slot was used.
      step: int64 [1], the number of the step.
    """

    count: int
    of_page: Tensor
    used: Tensor
    step: Tensor

    def assign(self, block_table: Tensor, lengths: Tensor, seen: Tensor, tokens: int) -> Tensor:
        """Slots int32 [B] of a step's requests, for what is open before it and after it.

        Args:
          block_table: int32 [B, columns], pages.
          lengths: int32 [B], tokens before the step.
          seen: int32 [B], tokens after it; 0 for a row of padding.
          tokens: of a page.
        """
        self.step.add_(1)
        nowhere = self.of_page.shape[0] - 1
        before = _open_page(block_table, lengths, tokens, nowhere)
        after = _open_page(block_table, seen, tokens, nowhere)
        held = before < nowhere
        new = ~held & (after < nowhere)
        found = torch.where(held, self.of_page[before], self.count).long()
        self.used[found] = self.step
        oldest = torch.argsort(self.used[: self.count], stable=True)
        rank = torch.cumsum(new, dim=0).sub(1).clamp(0, self.count - 1)
        found = torch.where(new, oldest[rank], found)
        # what is closed is free at once
        self.used[found] = torch.where(after < nowhere, self.step, 0)
        self.of_page[after] = found.to(torch.int32)
        return found.to(torch.int32)


def create(count: int, pages: int, device: torch.device) -> Slots:
    """All free."""
    return Slots(
        count,
        torch.full((pages + 1,), count, dtype=torch.int32, device=device),
        torch.zeros(count + 1, dtype=torch.int64, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
    )


def _open_page(block_table: Tensor, length: Tensor, tokens: int, nowhere: int) -> Tensor:
    """The page [B] of a block that is begun and not full; `nowhere` if there is none."""
    column = (length // tokens).clamp(0, block_table.shape[1] - 1).long()
    page = torch.gather(block_table, 1, column[:, None])[:, 0]
    return torch.where(length % tokens > 0, page, nowhere).long()
