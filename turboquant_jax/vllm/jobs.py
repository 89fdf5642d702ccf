"""What a step of an engine does in every layer alike: its requests, and the blocks it completes.

All of it is made once a step, before the first layer, of what vLLM says on the host and of what
only the device knows; no value on the device is waited for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pallas_kernels.primitives.period import PERIOD

BLOCKS = 64
"""Blocks of chunks that are compressed by one call: one shape, so one program."""


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

    def behind(self, sinks: int) -> "Chunk":
        """The same as blocks count it, which begin behind the sinks."""
        before, after = (max(0, end - sinks) for end in (self.past, self.past + self.new))
        return self._replace(new=after - before, past=before)


@dataclass(frozen=True, eq=False)
class Jobs:
    """Blocks to compress, int32 [n] each; those with a negative page are none.

    Attributes:
      row: of the tensors of keys and values that they are taken from.
      page: where they go.
      opening: the first page of their sequence, which has its mean key.
      number: of the block in its sequence.
    """

    row: Tensor
    page: Tensor
    opening: Tensor
    number: Tensor

    def columns(self, block: int) -> Tensor:
        """int32 [n, 6], as the encode kernel takes them."""
        zero, index = torch.zeros_like(self.row), self.number * block
        opens = (self.number == 0).int()
        return torch.stack([self.row, zero, self.page, self.opening, opens, index % PERIOD], dim=1)

    def only(self, kept: Tensor) -> "Jobs":
        """Those where `kept` [n] says so; the others go nowhere."""
        return Jobs(self.row, torch.where(kept, self.page, -1), self.opening, self.number)


def of_singles(table: Tensor, lengths: Tensor, seen: Tensor, slots: Tensor, block: int) -> Jobs:
    """The blocks that single tokens fill, from the slots of open blocks."""
    number = lengths // block
    filled = (seen % block == 0) & (seen > lengths)
    page = torch.gather(table, 1, number.clamp(max=table.shape[1] - 1)[:, None].long())[:, 0]
    return Jobs(slots, torch.where(filled, page, -1), table[:, 0].contiguous(), number)


@dataclass(frozen=True, eq=False)
class ChunkJobs:
    """The blocks that chunks fill: `BLOCKS` of them a call, in the order of the chunks.

    Attributes:
      counts: blocks of each chunk.
      calls: jobs whose rows count from the call's own first block; openings of sequences are in the
        first of a pair, the others, which need the means of those, in the second.
    """

    counts: tuple[int, ...]
    calls: tuple[tuple[Jobs | None, Jobs | None], ...]


def of_chunks(chunks: Sequence[Chunk], table: Tensor, block: int) -> ChunkJobs | None:
    """None if they fill no block."""
    counts = tuple((c.past + c.new) // block - c.past // block for c in chunks)
    rows: list[int] = []
    numbers: list[int] = []
    for chunk, count in zip(chunks, counts, strict=True):
        first = chunk.past // block
        rows += [chunk.row] * count
        numbers += range(first, first + count)
    if not rows:
        return None
    spare = -len(rows) % BLOCKS
    host = torch.tensor([[*rows, *[0] * spare], [*numbers, *[-1] * spare]], dtype=torch.int32)
    on_device = host.pin_memory() if table.device.type == "cuda" else host
    row, number = on_device.to(table.device, non_blocking=True)
    whole = table.index_select(0, row)
    page = torch.gather(whole, 1, number.clamp(min=0)[:, None].long())[:, 0]
    source = torch.arange(BLOCKS, dtype=torch.int32, device=table.device)
    calls: list[tuple[Jobs | None, Jobs | None]] = []
    for start in range(0, len(rows), BLOCKS):
        some, stop = slice(start, start + BLOCKS), min(start + BLOCKS, len(rows))
        own = Jobs(source, page[some], whole[some, 0].contiguous(), number[some].clamp(min=0))
        opens = numbers[start:stop].count(0)
        opening = own.only(number[some] == 0) if opens else None
        rest = own.only(number[some] > 0) if opens < stop - start else None
        calls.append((opening, rest))
    return ChunkJobs(counts, tuple(calls))


@dataclass(frozen=True, eq=False)
class Window:
    """Where a step has tokens in full precision: rows of `raw.Raw`, int64.

    Attributes:
      write: [tokens, K], of all new tokens; of sinks [m, K], of the first m of `sink_source`.
      sink_write, sink_source: of sinks among them, and which of the new tokens they are.
      ring, sinks: [rows, slots, K], of the requests with one new token, padded by `rows_of`.
      rings: buffers [most requests, slots, K, H] that keys and values of `ring` are gathered into,
        for one layer after the other.
      past: of each chunk [n, K], what its queries see in full precision; sinks come first.
      open: of each chunk [n, K], the tokens of its open block.
    """

    write: Tensor
    sink_write: Tensor
    sink_source: Tensor
    ring: Tensor
    sinks: Tensor
    rings: tuple[Tensor, Tensor]
    past: tuple[Tensor, ...]
    open: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Batch:
    """The requests of a step; the first `singles` have one new token each, then come chunks.

    Attributes:
      page_table: int32 [B, columns].
      lengths: int32 [B], tokens before the step.
      slots: int32 [B], where the open blocks of the requests are.
      place: int64 [singles], where their tokens go, counted through the slots.
      singles: how many requests have one new token.
      filled: blocks that single tokens fill, in buffers; None without single tokens.
      columns: `filled` as the encode kernel takes it.
      turned: of each layer the means of `filled`, float32 [layers, n, K, 2, H], or None.
      chunks: the others.
      chunk_jobs: blocks that these fill.
      window: where tokens in full precision lie in pages, if they do (`windowed`).
    """

    page_table: Tensor
    lengths: Tensor
    slots: Tensor
    place: Tensor
    singles: int
    filled: Jobs | None = None
    columns: Tensor | None = None
    turned: Tensor | None = None
    chunks: tuple[Chunk, ...] = ()
    chunk_jobs: ChunkJobs | None = None
    window: Window | None = None
