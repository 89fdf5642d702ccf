"""A layer and the steps of an engine with a window and sinks in full precision; see `raw`.

All new tokens go into pages of the window before any query looks. A request with one new token has
its window gathered from them into a ring, as the decode kernel reads it, and the block that it
completes is compressed from there. Blocks are compressed as soon as they are full, since another
request may share their page; attention reads them only behind the window.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from turboquant_jax.pytorch.layout import Layout
from turboquant_jax.pytorch.segments import Scores
from turboquant_jax.pytorch.state import Exact
from turboquant_jax.vllm import tiles
from turboquant_jax.vllm.jobs import Batch, Chunk, Window
from turboquant_jax.vllm.pages import NOWHERE, PageRows
from turboquant_jax.vllm.raw import Raw
from turboquant_jax.vllm.step import Layer, rows_of
from turboquant_jax.vllm.steps import Steps


@dataclass(frozen=True, eq=False)
class Windowed(Layer):
    """`Layer` with raw tokens in pages in place of open blocks; `keys` and `values` are empty."""

    raw: Raw | None = None

    def run(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, scores: Scores) -> Tensor:
        """Attention [tokens, N, H] of new queries; keys and values are [tokens, K, H]."""
        window, raw = batch.window, self.raw
        assert window is not None and raw is not None
        new = [x.to(raw.keys.dtype) for x in (k, v)]
        raw.write(window.write, new)
        if window.sink_source.shape[0]:
            raw.write(window.sink_write, [x.index_select(0, window.sink_source) for x in new])
        runs = [self._run_of(n, chunk, batch, new) for n, chunk in enumerate(batch.chunks)]
        if batch.singles:
            raw.read_into(window.rings, window.ring)
        blocks = [x.view(-1, self.config.block, *x.shape[2:]) for x in window.rings]
        self._compress_all(batch, runs, blocks)
        found = []
        if batch.singles:
            own = [x[: batch.singles] for x in new]
            ring = [x[: window.ring.shape[0]] for x in window.rings]
            held = [PageRows((1, *x.shape[:2]), x.flatten(0, 1)) for x in raw.read(window.sinks)]
            sinks = Exact(held[0], held[1])
            found.append(self._attend(batch, ring, sinks, q[: batch.singles], own, scores))
        for number, chunk in enumerate(batch.chunks):
            found.append(self._attend_new(batch, number, chunk, q, new, scores))
        return torch.cat(found) if len(found) > 1 else found[0]

    def _run_of(self, number: int, chunk: Chunk, batch: Batch, new: list[Tensor]) -> list[Tensor]:
        """Keys and values from the open block's first token to the chunk's last."""
        assert batch.window is not None and self.raw is not None
        first = max(0, self.config.sinks - chunk.past)
        own = [x[chunk.start + first : chunk.start + chunk.new] for x in new]
        if not batch.window.open[number].shape[0]:
            return own
        old = self.raw.read(batch.window.open[number])
        return [torch.cat(pair) for pair in zip(old, own, strict=True)]

    def _attend_new(
        self,
        batch: Batch,
        number: int,
        chunk: Chunk,
        q: Tensor,
        new: list[Tensor],
        scores: Scores,
    ) -> Tensor:
        """Several new tokens: themselves, what is in full precision before them, and the pages."""
        assert batch.window is not None and self.raw is not None
        if not chunk.past:
            return self._attend_chunk(batch, chunk, [], q, new, scores)
        own = slice(chunk.start, chunk.start + chunk.new)
        query, (key, value) = q[own], (x[own].to(q.dtype) for x in new)
        factor = scores.factor(self.config.head_dim)
        parts = [tiles.attend(query, key, value, factor, causal=True)]
        if batch.window.past[number].shape[0]:
            keys, values = (x.to(q.dtype) for x in self.raw.read(batch.window.past[number]))
            parts.append(tiles.attend(query, keys, values, factor))
        behind = self.config.compressed_tokens(chunk.past)
        if behind:
            parts.append(self._attend_pages(batch.page_table[chunk.row], behind, query, factor))
        return tiles.join(parts)[0].to(q.dtype)


class WindowedSteps(Steps):
    """`Steps` of such layers: vLLM's tables of both groups come one after the other."""

    def __init__(self, layers: Sequence[Windowed], count: int, columns: int, device: torch.device):
        super().__init__(layers, count, columns, device)
        config, raw = layers[0].config, layers[0].raw
        assert raw is not None
        self.config, self.raw = config, raw
        self.layout = Layout(config, config.sinks, config.window + config.block, 0)
        heads = config.num_kv_heads
        self.write, self.sink_write = (
            torch.zeros(count, heads, dtype=torch.int64, device=device) for _ in range(2)
        )
        self.each = torch.arange(count, device=device)
        self.ring, self.sinks = (
            torch.zeros(count, slots, heads, dtype=torch.int64, device=device)
            for slots in (self.layout.ring, config.sinks)
        )

        shape = count, self.layout.ring, heads, config.head_dim
        keys, values = (torch.zeros(shape, dtype=raw.keys.dtype, device=device) for _ in range(2))
        self.rings = keys, values

    def _assign(self, seen: Tensor, singles: int) -> None:
        """Open blocks are in the window's pages: `with_window` says where."""

    def _open_rows(self, before: Tensor) -> Tensor:
        """Rows of the rings, as blocks."""
        blocks = self.layout.ring // self.block
        return (self.each[: len(before)] * blocks + before // self.block % blocks).int()

    def with_window(self, batch: Batch, table: Tensor, seen: Tensor) -> Batch:
        """The step and where its raw tokens are, by the window's pages int32 [B, columns]."""
        count = batch.singles
        padded = rows_of(count, self.each.shape[0]) if count else 0
        written = [self._of_singles(table[:count], seen[:count], batch.lengths[:count], padded)]
        written += [self._written(table[chunk.row], chunk) for chunk in batch.chunks]
        write, sink_write, sink_source = (
            own[0] if len(own) == 1 else torch.cat(own) for own in zip(*written, strict=True)
        )
        seen_by = [self._seen(table[chunk.row], chunk) for chunk in batch.chunks]
        whole = Window(
            write=write,
            sink_write=sink_write,
            sink_source=sink_source,
            ring=self.ring[:padded],
            sinks=self.sinks[:padded],
            rings=self.rings,
            past=tuple(past for past, _ in seen_by),
            open=tuple(opened for _, opened in seen_by),
        )
        return replace(batch, window=whole)

    def _of_singles(
        self, table: Tensor, seen: Tensor, lengths: Tensor, padded: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Fills what requests with one new token read; says what they write (see `Window`)."""
        count, sinks = table.shape[0], self.config.sinks
        first, valid = self.table[:count, 0].long(), seen > lengths
        self.write[:count].copy_(self._rows(table, lengths[:, None], valid[:, None])[:, 0])
        page = torch.where(valid & (lengths < sinks), first, NOWHERE)
        self.sink_write[:count].copy_(self.raw.rows(page, lengths.clamp(max=max(sinks - 1, 0))))
        # as it is with the new token, but for the edge, which is that before it
        position = self.layout.exact_positions(lengths[:, None] + 1)[0][:, sinks:]
        held = (position >= self.layout.edge(lengths[:, None])) & (position >= 0)
        self.ring[:count].copy_(self._rows(table, position, held & valid[:, None]))
        place = torch.arange(sinks, device=table.device).expand(count, -1)
        self.sinks[:count].copy_(self.raw.rows(first[:, None].expand_as(place), place))
        for rows in (self.ring, self.sinks):
            rows[count:padded].zero_()
        some = slice(count if sinks else 0)
        return self.write[:count], self.sink_write[some], self.each[some]

    def _written(self, table: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """Where a chunk writes, and where its sinks, and which of the new tokens they are."""
        stop = chunk.past + chunk.new
        ends = (min(end, self.config.sinks) for end in (chunk.past, stop))
        sinks = torch.arange(*ends, device=table.device)
        rows = self._sinks_of(chunk, sinks)
        return self._span(table, chunk.past, stop), rows, sinks - chunk.past + chunk.start

    def _seen(self, table: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """What a chunk's queries see in full precision before it, and its open block."""
        sinks, past = self.config.sinks, chunk.past
        known = torch.arange(min(sinks, past), device=table.device)
        window = self._span(table, sinks + self.config.compressed_tokens(past), past)
        begun = sinks + max(0, past - sinks) // self.block * self.block
        return torch.cat([self._sinks_of(chunk, known), window]), self._span(table, begun, past)

    def _sinks_of(self, chunk: Chunk, place: Tensor) -> Tensor:
        """Rows [n, K] of sinks [n] of a request, which its first page has."""
        return self.raw.rows(self.table[chunk.row, 0].long().expand_as(place), place)

    def complete(self, batch: Batch, seen: Tensor) -> Batch:
        """With the window in vLLM's null page, for a step that is only compiled."""
        columns = -(-int(batch.page_table.shape[1] + 1) * self.block // self.raw.tokens)
        return self.with_window(batch, self.table.new_zeros(seen.shape[0], columns), seen)

    def _rows(self, table: Tensor, position: Tensor, kept: Tensor) -> Tensor:
        """Rows [B, n, K] of positions [B, n] in the window's pages; others are the null page's."""
        column = (position // self.raw.tokens).clamp(0, table.shape[1] - 1).long()
        page = torch.where(kept, torch.gather(table, 1, column), NOWHERE).long()
        return self.raw.rows(page, torch.where(kept, position % self.raw.tokens, 0))

    def _span(self, table: Tensor, first: int, stop: int) -> Tensor:
        """Rows [n, K] of the positions from `first` to `stop` of one request."""
        position = torch.arange(first, max(first, stop), device=table.device)
        page = table.index_select(0, position // self.raw.tokens).long()
        return self.raw.rows(page, position % self.raw.tokens)
