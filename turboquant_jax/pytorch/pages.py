"""Pages of the pool in torch: `cache.pages`, with references changed in place."""

import torch
from torch import Tensor

UNASSIGNED = -1


def assign(references: Tensor, current: Tensor, filled: Tensor) -> tuple[Tensor, Tensor]:
    """Give every filled entry [B, n] a page that nobody else refers to; see `cache.pages.assign`.

    Returns the pages [B, n], and which sequences [B] were granted all they needed.
    """
    count = references.shape[0]
    held = filled & (current != UNASSIGNED)
    index = torch.where(held, current, count).flatten().long()
    entry = torch.arange(filled.numel(), dtype=torch.int32, device=filled.device)
    spare = torch.zeros(count + 1, dtype=torch.int32, device=filled.device)
    leaving = spare.index_add(0, index, torch.ones_like(entry))
    last = spare.scatter_reduce(0, index, entry, "amax")
    page = torch.where(held, current, 0).long()
    alone = held & (references[page] == 1)
    keeps = held & (leaving[page] == references[page]) & (last[page] == entry.view(filled.shape))
    # should one of them not get its pages it would stay, and nobody may then take its page over
    fits = (filled & ~keeps).sum() <= (references == 0).sum()
    keeps = torch.where(fits, keeps, alone)
    wanted = filled & ~keeps
    new, granted = allocate(references, wanted)
    add(references, torch.where(wanted & granted[:, None], current, UNASSIGNED), -1)
    return torch.where(keeps, current, new), granted


def allocate(references: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Give every wanted entry [B, n] a free page, all of a sequence's or none of them."""
    count, size = references.shape[0], wanted.numel()
    rank = wanted.flatten().cumsum(0).view(wanted.shape) - 1
    unused = references == 0
    granted = ~(wanted & (rank >= unused.sum())).any(dim=1)
    # the numbers of the free pages in order, without a shape that depends on how many there are
    place = torch.where(unused, unused.cumsum(0) - 1, size).clamp(max=size)
    page = torch.arange(count, dtype=torch.int32, device=references.device)
    free = torch.full((size + 1,), count, dtype=torch.int32, device=references.device)
    free = free.scatter(0, place, page)
    given = wanted & granted[:, None]
    pages = torch.where(given, free[torch.where(given, rank, 0)], UNASSIGNED)
    add(references, pages, 1)
    return pages, granted


def add(references: Tensor, pages: Tensor, amount: int) -> None:
    """Add to the references of these pages; UNASSIGNED entries count for nothing."""
    index = torch.where(pages == UNASSIGNED, 0, pages).flatten().long()
    change = torch.where(pages == UNASSIGNED, 0, amount).flatten().to(torch.int32)
    references.index_add_(0, index, change)
