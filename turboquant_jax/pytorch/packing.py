"""Indices <-> bytes in torch: the layouts of `quantizers.packing` and `cache.blocks`."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from turboquant_jax.quantizers.formats import Widths, plane_bytes


def pack(indices: Tensor, widths: Widths) -> tuple[Tensor, ...]:
    """Pack uint8 indices along the last axis, into one array [*batch, bytes] per width."""
    count, planes, shift = indices.shape[-1], [], 0
    for width in widths:
        size, per_byte = plane_bytes(count, width), 8 // width
        field = (indices >> shift) & (2**width - 1)
        parts = F.pad(field, (0, size * per_byte - count)).unflatten(-1, (per_byte, size))
        byte = parts[..., 0, :]
        for k in range(1, per_byte):
            byte = byte | (parts[..., k, :] << (width * k))
        planes.append(byte)
        shift += width
    return tuple(planes)


def unpack(planes: Sequence[Tensor], widths: Widths, count: int) -> Tensor:
    """Invert `pack`: the first `count` indices along the last axis."""
    indices, shift = None, 0
    for plane, width in zip(planes, widths, strict=True):
        parts = [(plane >> (width * k)) & (2**width - 1) for k in range(8 // width)]
        field = torch.cat(parts, dim=-1)[..., :count] << shift
        indices = field if indices is None else indices | field
        shift += width
    assert indices is not None  # there is no code without planes
    return indices


def scale_words(key: Tensor | None, value: Tensor | None) -> Tensor:
    """Both bfloat16 scales of a token in one int32, whose bits are the uint32 of a page."""

    def bits(scale: Tensor) -> Tensor:
        return scale.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF

    if key is None or value is None:
        assert key is not None or value is not None
        return bits(key) if value is None else bits(value) << 16
    return bits(value) << 16 | bits(key)


def scales_of(words: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 scales of keys and of values in int32 words."""
    key, value = (half.to(torch.int16).view(torch.bfloat16) for half in (words, words >> 16))
    return key, value
