"""The metadata of steps, in buffers that CUDA graphs may hold: made once a step for all layers."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from turboquant_jax.pytorch.segments import Scores
from turboquant_jax.vllm import jobs, slots
from turboquant_jax.vllm.jobs import Batch, Chunk, Jobs
from turboquant_jax.vllm.step import Layer


class Steps:
    """What a step needs beside its tokens, of up to `count` requests with tables of `columns`.

    A graph that vLLM captured reads these buffers again when it is replayed, so that they are
    filled in place.
    """

    def __init__(self, layers: Sequence[Layer], count: int, columns: int, device: torch.device):
        self.layers, first = layers, layers[0]
        self.block, self.phases = first.config.block, first.phases
        pages = first.pages.part.pool.scales[0].lead[1]
        self.slots = slots.create(count, pages, device)
        self.table = torch.zeros(count, columns, dtype=torch.int32, device=device)
        self.lengths, self.found = (
            torch.zeros(count, dtype=torch.int32, device=device) for _ in range(2)
        )
        self.place = torch.zeros(count, dtype=torch.int64, device=device)
        self.columns = torch.full((count, 6), -1, dtype=torch.int32, device=device)
        self.filled = Jobs(
            *(torch.full((count,), x, dtype=torch.int32, device=device) for x in (0, -1, 0, 0))
        )
        self.turned: Tensor | None = None
        if first.kernels and self.phases is not None:
            heads, dim = first.config.num_kv_heads, first.config.head_dim
            shape = (len(layers), count, heads, 2, dim)
            self.turned = torch.zeros(shape, dtype=torch.float32, device=device)

    def batch(
        self,
        table: Tensor,
        seen: Tensor,
        starts: Tensor,
        singles: int,
        host_starts: Sequence[int],
        host_seen: Sequence[int],
    ) -> Batch:
        """A step.

        Args:
          table: int32 [B, columns], pages of the requests.
          seen: int32 [B], tokens after the step; 0 for a row of padding.
          starts: int32 [B + 1], where the new tokens of each request begin.
          singles: how many requests have one token; they come first.
          host_starts, host_seen: the same numbers, as the host knows them.
        """
        count, sinks = table.shape[0], self.layers[0].config.sinks
        some, one = slice(count), slice(singles)
        self.table[some].copy_(table)
        self.lengths[some].copy_((seen - starts.diff()).clamp(min=0))
        # blocks begin behind the sinks, and lie in the page after their own
        pages, lengths = self.table[some, bool(sinks) :], self.lengths[some]
        self._assign(seen, singles)
        chunks = tuple(
            Chunk(row, start, stop - start, host_seen[row] - (stop - start))
            for row, (start, stop) in enumerate(pairwise(host_starts[: count + 1]))
            if row >= singles and stop > start
        )
        self.filled.page.fill_(-1)  # behind the batch, and everywhere if no block is filled
        self.columns.fill_(-1)
        if any(end > sinks and (end - sinks) % self.block == 0 for end in host_seen[:singles]):
            before, after = ((x - sinks).clamp(min=0) for x in (lengths[one], seen[one]))
            own = (pages[one].contiguous(), before, after, self._open_rows(before))
            self._fill(jobs.of_singles(*own, self.block))
        behind = tuple(chunk.behind(sinks) for chunk in chunks)
        return Batch(
            page_table=pages,
            lengths=lengths,
            slots=self.found[some],
            place=self.place[one],
            singles=singles,
            filled=self.filled if singles else None,
            columns=self.columns,
            turned=self.turned,
            chunks=chunks,
            chunk_jobs=jobs.of_chunks(behind, pages.contiguous(), self.block),
        )

    def _assign(self, seen: Tensor, singles: int) -> None:
        """A slot for the open block of every request, and where the single tokens go."""
        one = slice(singles)
        table, lengths, found = (x[: len(seen)] for x in (self.table, self.lengths, self.found))
        found.copy_(self.slots.assign(table, lengths, seen, self.block))
        self.place[one].copy_(found[one].long() * self.block + lengths[one] % self.block)

    def _open_rows(self, before: Tensor) -> Tensor:
        """Where single tokens [n], behind so many others, have their open blocks: rows int32."""
        return self.found[: len(before)]

    def warm_up(self, heads: int, dtype: torch.dtype) -> None:
        """Run what no captured graph has: compiled at the start, not at the first request.

        A chunk behind a past, in queries of so many heads; all of its pages are vLLM's null block.
        """
        layer, new = self.layers[0], self.block + 1
        table, device = self.table[:1] * 0, self.table.device
        stop = layer.config.sinks + layer.config.window + self.block + new
        seen = torch.full((1,), stop, dtype=torch.int32, device=device)
        starts = torch.tensor([0, new], dtype=torch.int32, device=device)
        step = self.batch(table, seen, starts, 0, [0, new], [stop])
        step = self.complete(step, seen)
        counts = heads, *[layer.config.num_kv_heads] * 2
        q, k, v = (
            torch.zeros(new, count, layer.config.head_dim, dtype=dtype, device=device)
            for count in counts
        )
        layer.run(q, k, v, step, Scores())

    def complete(self, batch: Batch, seen: Tensor) -> Batch:
        """A step that is only compiled, with all that it needs."""
        return batch

    def _fill(self, filled: Jobs) -> None:
        """The blocks of single tokens for all layers alike, and the means that the layers have."""
        count = filled.row.shape[0]
        for held, new in zip(vars(self.filled).values(), vars(filled).values(), strict=True):
            held[:count].copy_(new)
        self.columns[:count].copy_(filled.columns(self.block))
        if self.turned is not None and self.phases is not None:
            from turboquant_jax.pytorch import kernels

            held = (layer.pages.means for layer in self.layers)
            means = [x[0].index_select(0, filled.opening) for x in held if x is not None]
            index = filled.number * self.block
            turned = kernels.turned_means(torch.stack(means), self.phases, index, self.block)
            self.turned[:, :count].copy_(turned)
