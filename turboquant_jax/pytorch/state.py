"""The compressed cache in torch: tensors in the layout of the JAX cache, changed in place.

`turboquant_jax.cache.state` says what each of them is; the kernels read both alike. All operations
are tensor operations of fixed shapes without a look at a value, so that CUDA graphs hold them.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import prod
from operator import itemgetter

import torch
from torch import Tensor

from turboquant_jax.cache.config import CacheConfig
from turboquant_jax.pytorch.codec import Codec
from turboquant_jax.pytorch.layout import Layout
from turboquant_jax.pytorch.pre_rope import Phases


class Rows:
    """Rows of a tensor, numbered through its leading axes, and one more for what goes nowhere."""

    def __init__(self, lead: tuple[int, ...], shape: tuple[int, ...], dtype, device):
        self.lead = lead
        self.storage = torch.zeros((prod(lead) + 1, *shape), dtype=dtype, device=device)

    @property
    def tensor(self) -> Tensor:
        """[*lead, *shape], contiguous."""
        return self.storage[:-1].view(*self.lead, *self.storage.shape[1:])

    def put(self, index: Tensor, kept: Tensor, new: Tensor) -> None:
        """Write new [*n, *shape] into rows `index` [*n], where `kept` [*n] says so."""
        place = torch.where(kept, index, self.storage.shape[0] - 1)
        self.storage.index_copy_(
            0, place.flatten().long(), new.reshape(-1, *self.storage.shape[1:])
        )


@dataclass(frozen=True, eq=False)
class Exact:
    """Tokens in full precision, [layers, B, slots, K, H] each."""

    keys: Rows
    values: Rows


@dataclass(frozen=True, eq=False)
class Blocks:
    """Pages [rows, pages, ...] by group and plane; `scales` hold the bits of uint32 as int32."""

    keys: tuple[tuple[Rows, ...], ...]
    values: tuple[tuple[Rows, ...], ...]
    scales: tuple[Rows, ...]

    @property
    def rows(self) -> list[Rows]:
        """All of them, in the order of a pytree's leaves."""
        planes = [plane for side in (self.keys, self.values) for group in side for plane in group]
        return [*planes, *self.scales]


@dataclass(frozen=True, eq=False)
class Part:
    """The heads of one format: codecs of keys and of values, and their pages.

    `heads` are (layer, head) of every row, `layer` and `head` the same as tensors.
    """

    codecs: tuple[Codec, Codec]
    pool: Blocks
    heads: tuple[tuple[int, int], ...]
    layer: Tensor
    head: Tensor


@dataclass(frozen=True, eq=False)
class Table:
    """Lengths and pages of the sequences; see `cache.state.Table`."""

    lengths: Tensor
    pending: Tensor
    overflow: Tensor
    page_table: Tensor
    pending_pages: Tensor
    references: Tensor


@dataclass(frozen=True, eq=False)
class Member:
    """Heads of a layer that share a part: their rows follow each other."""

    part: int
    heads: tuple[int, ...]
    rows: slice


@dataclass(frozen=True, eq=False)
class State:
    """The cache of all layers for B sequences."""

    config: CacheConfig
    capacity: int
    table: Table
    sinks: Exact
    window: Exact
    key_mean: Tensor | None
    phases: Phases | None
    parts: tuple[Part, ...]

    @property
    def layout(self) -> Layout:
        """The rule of place for the sizes of this cache."""
        sinks, ring = (segment.keys.lead[2] for segment in (self.sinks, self.window))
        return Layout(self.config, sinks, ring, self.table.page_table.shape[1])

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.table.lengths.shape[0]

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.table.lengths.device

    @cached_property
    def members(self) -> tuple[tuple[Member, ...], ...]:
        """Where the heads of each layer lie: one entry for each of their formats."""
        found: list[list[Member]] = [[] for _ in range(self.config.num_layers)]
        for number, part in enumerate(self.parts):
            first = 0
            for layer, group in groupby(part.heads, key=itemgetter(0)):
                heads = tuple(head for _, head in group)
                rows = slice(first, first + len(heads))
                found[layer].append(Member(number, heads, rows))
                first = rows.stop
        return tuple(map(tuple, found))

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Every tensor but those of codecs and angles, by name, in the JAX cache's layout."""
        found = dict(vars(self.table))
        for name in ("sinks", "window"):
            segment = getattr(self, name)
            found |= {
                f"{name}.{side}": getattr(segment, side).tensor for side in ("keys", "values")
            }
        if self.key_mean is not None:
            found["key_mean"] = self.key_mean
        for number, part in enumerate(self.parts):
            for place, rows in enumerate(part.pool.rows):
                scales = rows.storage.dtype == torch.int32
                tensor = rows.tensor.view(torch.uint32) if scales else rows.tensor
                found[f"parts.{number}.{place}"] = tensor
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor in `leaves`."""
        return sum(leaf.numel() * leaf.element_size() for leaf in self.leaves.values())
