"""A step of the engine on one layer: tokens are staged, full blocks compressed, queries answered.

Tokens of a request's open block lie in full precision in its slot (`slots`), all others compressed
in vLLM's pages (`pages`). Both are in place before any query looks, because requests may share
pages that are filled in this very step. What runs is the torch cache's: its kernels on a GPU, its
definition on a CPU. Where all requests have one new token nothing here depends on the host, so that
a CUDA graph holds the step.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from turboquant_jax.cache.config import CacheConfig
from turboquant_jax.pytorch import compression, definition, pre_rope, trellis
from turboquant_jax.pytorch.pre_rope import Phases
from turboquant_jax.pytorch.segments import Scores, SegmentPart
from turboquant_jax.pytorch.state import Exact, State, Table
from turboquant_jax.vllm import tiles
from turboquant_jax.vllm.jobs import BLOCKS, Batch, Chunk, Jobs
from turboquant_jax.vllm.pages import NOWHERE, PageRows, Pages

ENCODED = (2, 3, 4, 5)
"""Bits that the encode kernel is compiled for: with more, torch's Triton takes minutes."""


def rows_of(count: int, most: int) -> int:
    """Rows that so many single tokens are padded to: few shapes, for each is a program."""
    return min(1 << (count - 1).bit_length(), most)


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer's tokens: `keys` and `values` [slots, block, K, H] of open blocks, and pages.

    `kernels`: whether single tokens and compression are the GPU kernels' (on a CPU: interpreted).
    `number`: of the layer among those of the engine, as in `Batch.turned`.
    """

    config: CacheConfig
    phases: Phases | None
    keys: Tensor
    values: Tensor
    pages: Pages
    kernels: bool
    number: int = 0

    def run(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, scores: Scores) -> Tensor:
        """Attention [tokens, N, H] of new queries; keys and values are [tokens, K, H]."""
        new = [x.to(self.keys.dtype) for x in (k, v)]
        single = [x[: batch.singles] for x in new]
        runs = [self._staged(batch, chunk, new) for chunk in batch.chunks]
        if batch.singles:
            for held, own in zip((self.keys, self.values), single, strict=True):
                held.flatten(0, 1).index_copy_(0, batch.place, own)
        self._compress_all(batch, runs, [self.keys, self.values])
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

    def _stage_tail(self, batch: Batch, chunk: Chunk, run: list[Tensor]) -> None:
        rest = (chunk.past + chunk.new) % self.config.block
        if rest:
            slot = batch.slots[chunk.row][None].long()
            for held, own in zip((self.keys, self.values), run, strict=True):
                padded = F.pad(own[-rest:], (0, 0, 0, 0, 0, self.config.block - rest))
                held.index_copy_(0, slot, padded[None])

    def _compress_all(self, batch: Batch, runs: list[list[Tensor]], held: list[Tensor]) -> None:
        """First the opening blocks of sequences, whose means the others need.

        `held`: keys and values [rows, block, K, H], where `batch.filled` has its rows.
        """
        if batch.filled is not None:
            turned = None if batch.turned is None else batch.turned[self.number]
            self._compress(held, batch.filled, batch.columns, turned)
        if batch.chunk_jobs is None:
            return
        block, counts = self.config.block, batch.chunk_jobs.counts
        source = []
        for side in (0, 1):
            parts = [r[side][: n * block] for r, n in zip(runs, counts, strict=True) if n]
            rows = (torch.cat(parts) if len(parts) > 1 else parts[0]).unflatten(0, (-1, block))
            spare = -rows.shape[0] % BLOCKS
            source.append(F.pad(rows, (0, 0) * 3 + (0, spare)).split(BLOCKS))
        for turn in (0, 1):
            for number, calls in enumerate(batch.chunk_jobs.calls):
                jobs = calls[turn]
                if jobs is not None:
                    self._compress([x[number] for x in source], jobs)

    def _compress(
        self,
        source: list[Tensor],
        jobs: Jobs,
        columns: Tensor | None = None,
        turned: Tensor | None = None,
    ) -> None:
        """Rows of keys and values [rows, block, K, H] into pages."""
        block, means = self.config.block, self.pages.means
        if self.kernels and self.config.key.bits in ENCODED:
            from turboquant_jax.pytorch import kernels

            if columns is None:
                columns = jobs.columns(block)
            if turned is None and means is not None and self.phases is not None:
                own = means[0].index_select(0, jobs.opening)
                turned = kernels.turned_means(own, self.phases, jobs.number * block, block)
            held, source = None if means is None else means[0], [x.contiguous() for x in source]
            kernels.encode(self.pages.part, source, columns, held, self.phases, turned)
            return
        some = slice(None)
        if jobs.page.device.type == "cpu":  # which may look
            some = (jobs.page >= 0).nonzero()[:, 0]
            if not len(some):
                return
        row, page, opening, number = (
            x[some].long() for x in (jobs.row, jobs.page, jobs.opening, jobs.number)
        )
        blocks, mean = [x[row] for x in source], None
        if means is not None:
            of_first = pre_rope.mean_key(blocks[0], self.phases)
            opens = (page >= 0) & (number == 0)
            mean = torch.where(opens[:, None, None], of_first, means[0][opening])
            means[0].index_copy_(0, torch.where(opens, opening, NOWHERE), mean)
        state = self._state(opening[:, None], number, source, means)
        compression.store_blocks(
            state, self.pages.part, slice(None), blocks, mean, number, page, trellis.search
        )

    def _attend_singles(self, batch: Batch, q: Tensor, new: list[Tensor], scores: Scores) -> Tensor:
        nowhere = self.keys.shape[0] - 1
        spare = rows_of(batch.singles, nowhere) - batch.singles
        slot = F.pad(batch.slots[: batch.singles], (0, spare), value=nowhere)
        staged = [x.index_select(0, slot) for x in (self.keys, self.values)]
        return self._attend(batch, staged, self._no_sinks(staged), q, new, scores)

    def _attend(
        self,
        batch: Batch,
        window: list[Tensor],
        sinks: Exact,
        q: Tensor,
        new: list[Tensor],
        scores: Scores,
    ) -> Tensor:
        """Single tokens over pages and a window [rows, slots, K, H] of padded rows."""
        count = batch.singles
        spare = window[0].shape[0] - count
        table = F.pad(batch.page_table[:count], (0, 0, 0, spare), value=NOWHERE).contiguous()
        lengths = F.pad(batch.lengths[:count], (0, spare)).contiguous()
        means = self.pages.means
        mean = None if means is None else means.index_select(1, table[:, 0])
        state = self._state(table, lengths, window, mean, sinks)
        query, key, value = (F.pad(x, (0, 0, 0, 0, 0, spare))[:, None] for x in (q, *new))
        if self.kernels:
            from turboquant_jax.pytorch import kernels

            heads = query, key, value
            return kernels.attend_and_write(state, 0, heads, scores, None)[:count, 0]
        return definition.attend(state, 0, query, key, value, scores)[:count, 0]

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
        query, (key, value) = q[own], (x[own].to(q.dtype) for x in new)
        if not chunk.past:
            found = definition.attend_to_itself(query[None], key[None], value[None], scores)
            return found[0]
        factor, held = scores.factor(self.config.head_dim), chunk.past % self.config.block
        parts = [tiles.attend(query, key, value, factor, causal=True)]
        if held:
            keys, values = (x[:held].to(q.dtype) for x in run)
            parts.append(tiles.attend(query, keys, values, factor))
        if chunk.past >= self.config.block:
            parts.append(self._attend_pages(batch.page_table[chunk.row], chunk.past, query, factor))
        return tiles.join(parts)[0].to(q.dtype)

    def _attend_pages(self, table: Tensor, past: int, query: Tensor, factor: float) -> SegmentPart:
        """Over the whole blocks of the first `past` tokens; of these, all queries see all."""
        codecs, heads, block = self.pages.part.codecs, self.config.num_kv_heads, self.config.block
        turned, found = tiles.rotated(codecs[0], query, heads), None
        for first in range(0, past // block, tiles.PAGES):
            count = min(past // block - first, tiles.PAGES)
            pages = F.pad(table[first : first + count], (0, tiles.PAGES - count), value=NOWHERE)
            keys, values = (x[: count * block] for x in self._decoded(pages, query.dtype))
            if self.pages.means is not None:
                mean = self.pages.means[0].index_select(0, table[:1])[0]
                keys = tiles.with_mean(keys, mean, self.phases, codecs[0], first * block)
            part = tiles.attend(turned, keys, values, factor)
            found = part if found is None else tiles.join([found, part])
        assert found is not None
        return tiles.unrotated(codecs[1], found[0], heads), found[1]

    def _decoded(self, pages: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [tokens, K, H] of some pages in the rotated space."""
        part = self.pages.part
        if self.kernels:
            from turboquant_jax.pytorch import kernel_operands, operators

            rows = kernel_operands.once(part, "rows", lambda: part.head.to(torch.int32))
            every = slice(0, len(part.heads))
            blocks = kernel_operands.blocks_of(part, every)
            keys, values = operators.decode((blocks,), pages, rows, dtype=dtype)
            return keys.flatten(0, 1), values.flatten(0, 1)
        none = [x[:1] for x in (self.keys, self.values)]
        state = self._state(pages[None], pages[:1], none, None)
        keys, values = definition.decoded(state, part, state.members[0][0])
        return keys[0].to(dtype), values[0].to(dtype)

    @cached_property
    def _references(self) -> Tensor:
        """The reference counts of pages, which nothing here reads."""
        pages = self.pages.part.pool.scales[0].lead[1]
        return torch.zeros(1, dtype=torch.int32, device=self.keys.device).expand(pages)

    @cached_property
    def _ones(self) -> Tensor:
        """int32, as many as there are slots."""
        return torch.ones(self.keys.shape[0], dtype=torch.int32, device=self.keys.device)

    @staticmethod
    def _no_sinks(window: list[Tensor]) -> Exact:
        none = window[0].new_zeros(0, *window[0].shape[2:])
        sinks = PageRows((1, window[0].shape[0], 0), none)
        return Exact(sinks, sinks)

    def _state(
        self,
        table: Tensor,
        lengths: Tensor,
        window: list[Tensor],
        means: Tensor | None,
        sinks: Exact | None = None,
    ) -> State:
        """The torch cache whose window is [B, slots, K, H] in full precision: these tensors alone.

        Without a window of its own, open blocks.
        """
        config = self.config
        held = [PageRows((1, *x.shape[:2]), x.flatten(0, 1)) for x in window]
        one = self._ones[: lengths.shape[0]]
        return State(
            config=config,
            capacity=config.sinks + config.window + config.block * max(table.shape[1], 1),
            table=Table(
                lengths=lengths,
                pending=one,
                overflow=one,
                page_table=table,
                pending_pages=table,
                references=self._references,
            ),
            sinks=sinks or self._no_sinks(window),
            window=Exact(held[0], held[1]),
            key_mean=means,
            phases=self.phases,
            parts=(self.pages.part,),
        )
