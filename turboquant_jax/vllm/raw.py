"""Tokens in full precision in vLLM's pages: the last ones of a request, and its first ones.

vLLM gives a request pages of two groups of layers, all of one size and out of one pool. A page of
the first group holds the codes of a block. One of the second, which vLLM keeps for as long as the
window needs it, holds the raw keys and values of fewer tokens, where the codes of a block would lie
in the widest plane of keys, and of values. In the same way the first page of a request holds its
sinks: blocks begin behind them, and each lies in the page after its own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from turboquant_jax.cache.config import CacheConfig
from turboquant_jax.pytorch.codec import Codec
from turboquant_jax.vllm.pages import Pages


@dataclass(frozen=True, eq=False)
class Raw:
    """Pages as raw tokens: `keys` and `values` [heads * pages * tokens, H], views of the planes.

    `tokens`: of a page. `pages`: of the pool.
    """

    keys: Tensor
    values: Tensor
    tokens: int
    pages: int

    def rows(self, page: Tensor, place: Tensor) -> Tensor:
        """Rows int64 [..., K] of the tokens at some places of some pages [...]."""
        heads = self.keys.shape[0] // (self.pages * self.tokens)
        head = torch.arange(heads, device=page.device) * self.pages
        return (head + page[..., None]) * self.tokens + place[..., None]

    def write(self, rows: Tensor, new: list[Tensor]) -> None:
        """Keys and values [n, K, H] of tokens into rows [n, K]."""
        for held, own in zip((self.keys, self.values), new, strict=True):
            held.index_copy_(0, rows.flatten(), own.to(held.dtype).flatten(0, 1))

    def read(self, rows: Tensor) -> list[Tensor]:
        """Keys and values [..., K, H] of rows [..., K]."""
        return [
            held.index_select(0, rows.flatten()).view(*rows.shape, held.shape[1])
            for held in (self.keys, self.values)
        ]

    def read_into(self, out: tuple[Tensor, Tensor], rows: Tensor) -> None:
        """The same into the first rows of `out`, keys and values."""
        for held, own in zip((self.keys, self.values), out, strict=True):
            into = own[: rows.shape[0]].view(-1, held.shape[1])
            torch.index_select(held, 0, rows.flatten(), out=into)


def tokens_of(config: CacheConfig, codecs: tuple[Codec, Codec], dtype: torch.dtype) -> int:
    """Raw tokens of a page: those that fit where the widest plane of a block's keys lies."""
    return min(8 * _widest(codec)[1] // dtype.itemsize for codec in codecs) * config.block // 64


def over(pages: Pages, config: CacheConfig, dtype: torch.dtype) -> Raw:
    """The raw tokens of a layer's pages."""
    part = pages.part
    tokens, found = tokens_of(config, part.codecs, dtype), []
    for codec, planes in zip(part.codecs, (part.pool.keys, part.pool.values), strict=True):
        storage = planes[0][_widest(codec)[0]].storage
        found.append(storage.view(-1).view(dtype).view(-1, config.head_dim))
    return Raw(found[0], found[1], tokens, part.pool.scales[0].lead[1])


def _widest(codec: Codec) -> tuple[int, int]:
    """Number and bits of the widest plane of codes."""
    widths = codec.groups[0].constants.plane_widths
    return max(enumerate(widths), key=lambda plane: plane[1])
