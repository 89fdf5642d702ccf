"""A call of a model over a torch cache: what its layers share, and what the host knows meanwhile.

The host follows the lengths of the sequences by itself. It looks at the device only where a chunk
comes with a mask, to count its padding.
"""

import torch
from torch import Tensor

from turboquant_jax.cache.config import CacheConfig
from turboquant_jax.pytorch import choose, sharing, updating
from turboquant_jax.pytorch.segments import Scores
from turboquant_jax.pytorch.state import State


class Steps:
    """Where the sequences stand.

    Attributes:
      lengths: tokens of each sequence.
      seen: columns of the batch that went by, padding included.
      unpadded: the newest of them that are tokens in every sequence.
      captured: the counts [B] of a captured step, whose calls change nothing here; or None.
      within: whether a call has begun whose last layer has not written yet.
    """

    def __init__(self, config: CacheConfig):
        self.config = config
        self.captured: Tensor | None = None
        self.completes: Tensor | None = None
        self.order: Tensor | None = None
        self.empty = False
        self.start(0)

    def start(self, batch: int) -> None:
        """No tokens."""
        self.lengths, self.seen, self.unpadded = [0] * max(batch, 0), 0, 0
        self.within = False

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths, default=0)

    def completing(self) -> list[int]:
        """The sequences of which one more token completes a block."""
        blocks = self.config.num_blocks
        return [b for b, n in enumerate(self.lengths) if blocks(n + 1) > blocks(n)]

    def advance(self) -> None:
        """After a captured step: one token more of every sequence."""
        self.lengths = [length + 1 for length in self.lengths]
        self.seen += 1
        self.unpadded += 1

    def begin(self, state: State, count: int, mask: Tensor | None) -> None:
        """Announce `count` columns; `mask` [B, count] says which are tokens.

        Raises:
          ValueError: the last call did not come to its last layer.
        """
        if self.within:
            raise ValueError(
                "cache: got one whose last call ended before the model's last layer, expected a "
                "whole one: reset() it"
            )
        self.within = True
        self.order, self.empty = None, False
        if self.captured is not None:
            assert self.completes is not None
            some = self.completes.shape[0] > 0
            updating.begin(state, self.captured, count, completes=some)
            return
        self.empty = not self.seen
        real = None
        # single tokens are tokens, but in the left padding of a sequence that has none yet
        if mask is not None and (count > 1 or not all(self.lengths)):
            real = mask.to("cpu", torch.bool)
        if real is None or bool(real.all()):
            counts = [count] * state.batch
            self.unpadded += count
        else:
            counts = real.sum(dim=1).tolist()
            columns = real.all(dim=0).flip(0).to(torch.int32)
            self.unpadded = int(columns.cumprod(0).sum())
            # tokens first, in their order; padding behind them
            self.order = torch.argsort(~real, dim=1, stable=True).to(state.device)
        updating.begin(state, _on_device(counts, torch.int32, state.device), count)
        rows = [b for b in self.completing() if counts[b] == 1]
        self.completes = _on_device(rows, torch.int64, state.device)
        self.lengths = [old + new for old, new in zip(self.lengths, counts, strict=True)]
        self.seen += count

    def layer(
        self, state: State, layer: int, heads: tuple, scores: Scores, sink_logits: Tensor | None
    ) -> Tensor:
        """Attention of new queries, keys and values [B, T, heads, H], which are then written."""
        order = self.order
        if order is not None:
            heads = tuple(_along_tokens(x, order) for x in heads)
        output = choose.attend_and_write(state, layer, heads, scores, sink_logits, empty=self.empty)
        if order is not None:
            output = _along_tokens(output, torch.argsort(order, dim=1))
        if layer == state.config.num_layers - 1:
            choose.commit(state, self.completes)
            self.within = False
        return output

    def crop(self, state: State, count: int) -> None:
        """Take back the newest `count` columns.

        Raises:
          ValueError: padding among them, or a block that the window no longer holds.
        """
        if count > self.unpadded:
            raise ValueError(
                f"crop: got {count} tokens, expected at most {self.unpadded}: padding came before"
            )
        ring = state.layout.ring
        for length in self.lengths:
            edge = self.config.sinks + self.config.compressed_tokens(length - count)
            blocks = self.config.num_blocks
            lost = length - edge > ring or blocks(length) > state.layout.slots
            if blocks(length) > blocks(length - count) and lost:
                raise ValueError(
                    f"crop: got {count} tokens of a sequence of {length}, expected fewer: the "
                    f"window no longer holds the tokens from {edge} on, which are compressed"
                )
        sharing.crop(state, count)
        self.lengths = [length - count for length in self.lengths]
        self.seen -= count
        self.unpadded -= count

    def select(self, rows: list[int]) -> None:
        """Sequence i is what sequence rows[i] was."""
        self.lengths = [self.lengths[row] for row in rows]


def room_for(config: CacheConfig, tokens: int) -> int:
    """Capacity for so many tokens and as many again, of whole rings and blocks."""
    least = config.sinks + config.window + config.block
    return max(least, -(-2 * tokens // config.block) * config.block + config.sinks)


def _on_device(numbers: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A copy waits for the device, and most lists have one number, or none."""
    if len(set(numbers)) > 1:
        return torch.tensor(numbers, dtype=dtype, device=device)
    return torch.full((len(numbers),), max(numbers, default=0), dtype=dtype, device=device)


def _along_tokens(x: Tensor, order: Tensor) -> Tensor:
    """x[b, order[b, t]] of x [B, T, heads, H]."""
    return torch.gather(x, 1, order[:, :, None, None].expand(x.shape))
