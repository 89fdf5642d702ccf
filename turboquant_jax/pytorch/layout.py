"""Where the tokens of a sequence lie: the rule of `cache.layout`, on tensors.

Tests hold it against that module, for all lengths.
"""

from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from turboquant_jax.cache.config import CacheConfig


class Layout(NamedTuple):
    """The rule for a cache of certain sizes; see `cache.layout.Layout`."""

    config: CacheConfig
    sinks: int
    ring: int
    slots: int

    def edge(self, length: Tensor) -> Tensor:
        """The first position behind the compressed blocks."""
        return self.config.sinks + self.config.compressed_tokens(length)

    def window_slot(self, position: Tensor) -> Tensor:
        """The slot of the window for a position behind the sinks."""
        return (position - self.config.sinks) % max(self.ring, 1)

    def block_start(self, block: Tensor) -> Tensor:
        """The position of a block's first token."""
        return self.config.sinks + block * self.config.block

    def exact_positions(self, length: Tensor) -> tuple[Tensor, Tensor]:
        """Position [B, S] of the token in each slot of sinks and window; whether it is one."""
        sink = _arange(self.sinks, length) + torch.zeros_like(length)
        newest = length - 1 - self.config.sinks
        ring = (
            newest - (newest - _arange(self.ring, length)) % max(self.ring, 1) + self.config.sinks
        )
        held = (ring >= self.edge(length)) & (ring >= 0)
        return torch.cat([sink, ring], dim=1), torch.cat([sink < length, held], dim=1)

    def block_positions(self, length: Tensor) -> tuple[Tensor, Tensor]:
        """Position [B, S] of every token in each slot of the page table; whether it is one."""
        last = self.config.num_blocks(length) - 1
        block = last - (last - _arange(self.slots, length)) % max(self.slots, 1)
        token = _arange(self.config.block, length)
        position = self.block_start(block)[..., None] + token[:, None]
        held = (block >= 0)[..., None].expand(position.shape)
        return position.flatten(1), held.flatten(1)

    def written(self, length: Tensor, pending: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Slots [B, T] of the sinks, and of the window, for `count` new tokens; past the end for

        nowhere. Of a chunk longer than the window only the newest tokens go there.
        """
        token = _arange(count, length)
        position = length + token
        valid, behind = token < pending, position >= self.config.sinks
        newest = token >= pending - self.ring
        sink = torch.where(valid & ~behind, position, self.sinks)
        window = torch.where(valid & behind & newest, self.window_slot(position), self.ring)
        return sink, window

    def completed(self, length: Tensor, counts: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Slots [B, n] of the blocks that `counts` tokens complete; which candidates they are."""
        first = self.config.num_blocks(length)[:, None]
        last = self.config.num_blocks(length + counts)[:, None]
        candidates = ceil(most / self.config.block) if self.slots else 0
        block = first + _arange(candidates, length)
        filled = (block < last) & (block >= last - self.slots)
        return block % max(self.slots, 1), filled

    def sees(self, query: Tensor, position: Tensor, window: int | None) -> Tensor:
        """Which positions [B, S] each query [B, T] sees, of a model with this sliding window."""
        distance = query[:, :, None] - position[:, None, :]
        seen = distance >= 0
        return seen if window is None else seen & (distance < window)


def block_slots(config: CacheConfig, capacity: int) -> int:
    """Most blocks that a sequence holds at a time: `cache.layout.block_slots`."""
    slots = config.num_blocks(capacity)
    if config.sliding_window is None:
        return slots
    return min(slots, max(0, ceil((config.sliding_window - 1 - config.window) / config.block)))


def _arange(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=like.device)[None, :]
