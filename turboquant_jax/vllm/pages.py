"""The memory that vLLM has for a layer's pages, as the kernels read them.

vLLM allocates one tensor a layer, of a number of bytes for each page, and names pages by number.
What lies where in it is ours to say: all pages of a plane follow each other, head by head, so that
the kernels find a plane where the torch cache has it. A page also holds the mean key that belongs
to a sequence whose first page it is.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from turboquant_jax.cache.config import CacheConfig
from turboquant_jax.pytorch.codec import Codec
from turboquant_jax.pytorch.state import Blocks, Part, Rows
from turboquant_jax.quantizers.formats import plane_bytes

NOWHERE = 0
"""vLLM's null block: a page that no request is given."""


class PageRows(Rows):
    """Rows of a view into vLLM's memory; what goes nowhere goes to its null block."""

    def __init__(self, lead: tuple[int, ...], storage: Tensor):
        self.lead, self.storage = lead, storage

    @property
    def tensor(self) -> Tensor:
        """[*lead, *shape], contiguous."""
        return self.storage.view(*self.lead, *self.storage.shape[1:])

    def put(self, index: Tensor, kept: Tensor, new: Tensor) -> None:
        """Write new [*n, *shape] into rows `index` [*n], where `kept` [*n] says so."""
        place = torch.where(kept, index, NOWHERE).flatten().long()
        self.storage.index_copy_(0, place, new.reshape(-1, *self.storage.shape[1:]))


@dataclass(frozen=True, eq=False)
class Pages:
    """Pages of a layer, and the mean keys [1, pages, K, H] of those that are first ones."""

    part: Part
    means: Tensor | None


def token_bytes(config: CacheConfig, codecs: tuple[Codec, Codec]) -> int:
    """Bytes of a page for each of its tokens and heads."""
    whole = sum(prod(shape) * dtype.itemsize for shape, dtype in _shapes(config, codecs))
    return -(-whole // config.block)


def carve(memory: Tensor, config: CacheConfig, codecs: tuple[Codec, Codec]) -> Pages:
    """Views into a layer's memory, uint8 [pages, ...], contiguous.

    Raises:
      ValueError: memory that is not pages of this configuration.
    """
    heads, count = config.num_kv_heads, memory.shape[0]
    expected = count * config.block * heads * token_bytes(config, codecs)
    if memory.dtype != torch.uint8 or not memory.is_contiguous() or memory.numel() != expected:
        raise ValueError(
            f"memory of the pages: got {memory.dtype} {list(memory.shape)}, "
            f"expected {expected} bytes in a row"
        )
    rest, found = memory.view(-1), []
    for shape, dtype in _shapes(config, codecs):
        size = heads * count * prod(shape) * dtype.itemsize
        own, rest = rest[:size].view(dtype), rest[size:]
        found.append(PageRows((heads, count), own.view(heads * count, *shape)))
    planes = iter(found)
    keys, values = (
        tuple(tuple(next(planes) for _ in group.constants.plane_widths) for group in codec.groups)
        for codec in codecs
    )
    scales = tuple(next(planes) for _ in range(max(codec.scale_count for codec in codecs)))
    means = (
        next(planes).storage.view(1, count, heads, config.head_dim) if config.center_keys else None
    )
    of = tuple((0, head) for head in range(heads))
    layer, head = (torch.tensor(x, device=memory.device) for x in zip(*of, strict=True))
    return Pages(Part(codecs, Blocks(keys, values, scales), of, layer, head), means)


def _shapes(
    config: CacheConfig, codecs: tuple[Codec, Codec]
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """What a head has in a page, largest alignment kept: planes, scales, mean."""
    tokens, dim = config.block, config.head_dim
    found: list[tuple[tuple[int, ...], torch.dtype]] = []
    for side, codec in enumerate(codecs):
        for group in codec.groups:
            own = group.constants
            count, rows = (tokens, own.dim) if side else (own.dim, tokens)
            found += [((rows, plane_bytes(count, w)), torch.uint8) for w in own.plane_widths]
    words = max(codec.scale_count for codec in codecs)
    found += [((tokens,), torch.int32)] * words
    if config.center_keys:
        found.append(((dim,), torch.float32))
    return found
