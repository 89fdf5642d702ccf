"""A step of the engine on one layer: tokens are staged, full blocks compressed, queries answered.

Tokens of a request's open block lie in full precision in its slot (`slots`), all others compressed
in vLLM's pages (`pages`). Both are in place before any query looks, because requests may share
pages that are filled in this very step. What runs is the torch cache's: its kernels on a GPU, its
definition on a CPU.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from turboquant_jax.cache.config import CacheConfig
from turboquant_jax.pytorch import compression, definition, pre_rope, trellis
from turboquant_jax.pytorch.pre_rope import Phases
from turboquant_jax.pytorch.segments import Scores
from turboquant_jax.pytorch.state import Exact, State, Table
from turboquant_jax.vllm.pages import NOWHERE, PageRows, Pages


class Chunk(NamedTuple):
    """Several new tokens of one request, in numbers that the host knows.

    Attributes:
      row: of the request in the batch.
      start: of its tokens among all new ones.
      new: how many they are.
      past: how many came before.
    """

    row: int
    start: int
    new: int
    past: int


@dataclass(frozen=True, eq=False)
class Batch:
    """The requests of a step; the first `singles` have one new token each, then come chunks.

    `page_table` int32 [B, columns], and int32 [B]: `lengths` before the step, `seen` after it, 0
    for padding, and `slots`. `completes`: whether a single token may complete a block.
    """

    page_table: Tensor
    lengths: Tensor
    seen: Tensor
    slots: Tensor
    singles: int
    chunks: tuple[Chunk, ...] = ()
    completes: bool = True


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer's tokens: `keys` and `values` [slots, block, K, H] of open blocks, and pages.

    `kernels`: whether single tokens and compression are the GPU kernels' (on a CPU: interpreted).
    """

    config: CacheConfig
    phases: Phases | None
    keys: Tensor
    values: Tensor
    pages: Pages
    kernels: bool

    def run(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, scores: Scores) -> Tensor:
        """Attention [tokens, N, H] of new queries; keys and values are [tokens, K, H]."""
        new = [x.to(self.keys.dtype) for x in (k, v)]
        single = [x[: batch.singles] for x in new]
        runs = [self._staged(batch, chunk, new) for chunk in batch.chunks]
        if batch.singles:
            self._stage_singles(batch, single)
            if batch.completes:
                self._compress_singles(batch)
        self._compress_chunks(batch, runs)
        found = []
        if batch.singles:
            found.append(self._attend_singles(batch, q[: batch.singles], single, scores))
        for chunk, run in zip(batch.chunks, runs, strict=True):
            found.append(self._attend_chunk(batch, chunk, run, q, new, scores))
        for chunk, run in zip(batch.chunks, runs, strict=True):
            self._stage_tail(batch, chunk, run)
        return torch.cat(found) if len(found) > 1 else found[0]

    def _staged(self, batch: Batch, chunk: Chunk, new: list[Tensor]) -> list[Tensor]:
        """Keys and values [tokens, K, H] from the open block's first token to the chunk's last."""
        slot, held = batch.slots[chunk.row], chunk.past % self.config.block
        own = [x[chunk.start : chunk.start + chunk.new] for x in new]
        if not held:
            return own
        old = (x.index_select(0, slot[None])[0, :held] for x in (self.keys, self.values))
        return [torch.cat(pair) for pair in zip(old, own, strict=True)]

    def _stage_singles(self, batch: Batch, new: list[Tensor]) -> None:
        slot = batch.slots[: batch.singles].long()
        place = (batch.lengths[: batch.singles] % self.config.block).long()
        # a block that this token completes at once has no slot: it is one token long
        for held, own in zip((self.keys, self.values), new, strict=True):
            held.index_put_((slot, place), own)

    def _stage_tail(self, batch: Batch, chunk: Chunk, run: list[Tensor]) -> None:
        rest = (chunk.past + chunk.new) % self.config.block
        if rest:
            slot = batch.slots[chunk.row][None].long()
            for held, own in zip((self.keys, self.values), run, strict=True):
                padded = F.pad(own[-rest:], (0, 0, 0, 0, 0, self.config.block - rest))
                held.index_copy_(0, slot, padded[None])

    def _compress_singles(self, batch: Batch) -> None:
        some, block = slice(batch.singles), self.config.block
        number = batch.lengths[some] // block
        filled = (batch.seen[some] % block == 0) & (batch.seen[some] > 0)
        page = torch.gather(batch.page_table[some], 1, number[:, None].long())[:, 0]
        page = torch.where(filled, page, -1)
        source = [self.keys, self.values]
        self._compress(source, batch.slots[some], page, batch.page_table[some][:, 0], number)

    def _compress_chunks(self, batch: Batch, runs: list[list[Tensor]]) -> None:
        """First the opening blocks of sequences, whose mean the others need."""
        block = self.config.block
        jobs: tuple[list, list] = ([], [])
        for chunk, run in zip(batch.chunks, runs, strict=True):
            first = chunk.past // block
            count = (chunk.past + chunk.new) // block - first
            pages = batch.page_table[chunk.row]
            for number in range(first, first + count):
                start = (number - first) * block
                own = [x[start : start + block] for x in run]
                jobs[number > 0].append((own, pages[number], pages[0], number))
        for some in jobs:
            if not some:
                continue
            blocks, page, mean, numbers = zip(*some, strict=True)
            spare = (1 << (len(some) - 1).bit_length()) - len(some)  # few shapes, few programs
            source = [
                F.pad(torch.stack([own[side] for own in blocks]), (0, 0) * 3 + (0, spare))
                for side in (0, 1)
            ]
            number = torch.tensor(
                [*numbers, *[0] * spare], dtype=torch.int32, device=page[0].device
            )
            row = torch.arange(len(some) + spare, dtype=torch.int32, device=number.device)
            self._compress(
                source, row, F.pad(torch.stack(page), (0, spare), value=-1),
                F.pad(torch.stack(mean), (0, spare)), number,
            )  # fmt: skip

    def _compress(
        self, source: list[Tensor], row: Tensor, page: Tensor, opening: Tensor, number: Tensor
    ) -> None:
        """Rows [n] of keys and values [rows, block, K, H] into pages [n], -1 for none.

        They are blocks `number` [n] of sequences whose first pages are `opening` [n].
        """
        state = self._state(opening[:, None], number * self.config.block, source, self.pages.means)
        if self.kernels:
            from turboquant_jax.pytorch import kernels

            columns = row, torch.zeros_like(row), page, opening, number
            kernels.encode_jobs(state, self.pages.part, source, columns)
            return
        blocks, mean = [x[row.long()] for x in source], None
        if self.pages.means is not None:
            means, opens = self.pages.means[0], (page >= 0) & (number == 0)
            of_first = pre_rope.mean_key(blocks[0], self.phases)
            mean = torch.where(opens[:, None, None], of_first, means[opening.long()])
            means.index_copy_(0, torch.where(opens, opening, NOWHERE).long(), mean)
        compression.store_blocks(
            state, self.pages.part, slice(None), blocks, mean, number, page, trellis.search
        )

    def _attend_singles(self, batch: Batch, q: Tensor, new: list[Tensor], scores: Scores) -> Tensor:
        some = slice(batch.singles)
        slot = batch.slots[some]
        staged = [x.index_select(0, slot) for x in (self.keys, self.values)]
        table = batch.page_table[some].contiguous()
        mean = self._means_of(table[:, 0])
        state = self._state(table, batch.lengths[some].contiguous(), staged, mean)
        query, key, value = (x[:, None] for x in (q, *new))
        if self.kernels:
            from turboquant_jax.pytorch import kernels

            heads = query, key, value
            return kernels.attend_and_write(state, 0, heads, scores, None)[:, 0]
        return definition.attend(state, 0, query, key, value, scores)[:, 0]

    def _attend_chunk(
        self,
        batch: Batch,
        chunk: Chunk,
        run: list[Tensor],
        q: Tensor,
        new: list[Tensor],
        scores: Scores,
    ) -> Tensor:
        own = slice(chunk.start, chunk.start + chunk.new)
        query, key, value = (x[None, own] for x in (q, *new))
        if not chunk.past:
            return definition.attend_to_itself(query, key, value, scores)[0]
        block, row = self.config.block, slice(chunk.row, chunk.row + 1)
        held = chunk.past % block
        staged = [F.pad(x[:held], (0, 0, 0, 0, 0, block - held))[None] for x in run]
        table = batch.page_table[row, : chunk.past // block].contiguous()
        mean = self._means_of(batch.page_table[row, 0])
        state = self._state(table, batch.lengths[row], staged, mean)
        return definition.attend(state, 0, query, key, value, scores)[0]

    def _means_of(self, opening: Tensor) -> Tensor | None:
        """Mean keys [1, B, K, H] of sequences with these first pages."""
        return None if self.pages.means is None else self.pages.means.index_select(1, opening)

    def _state(
        self, table: Tensor, lengths: Tensor, window: list[Tensor], means: Tensor | None
    ) -> State:
        """The torch cache whose window is the open blocks [B, block, K, H]: these tensors alone."""
        config, batch = self.config, window[0].shape[0]
        none = window[0].new_zeros(0, *window[0].shape[2:])
        sinks = PageRows((1, batch, 0), none)
        held = [PageRows((1, *x.shape[:2]), x.flatten(0, 1)) for x in window]
        pages = self.pages.part.pool.scales[0].lead[1]
        one = torch.ones_like(lengths)
        return State(
            config=config,
            capacity=config.block * max(table.shape[1], 1),
            table=Table(
                lengths=lengths,
                pending=one,
                overflow=one,
                page_table=table,
                pending_pages=table,
                references=lengths.new_zeros(1).expand(pages),
            ),
            sinks=Exact(sinks, sinks),
            window=Exact(held[0], held[1]),
            key_mean=means,
            phases=self.phases,
            parts=(self.pages.part,),
        )
