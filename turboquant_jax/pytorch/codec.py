"""Vectors to codes and back in torch: `quantizers.quantizer` and `cache.codec`, step by step.

The arithmetic is that of the JAX library in float32. Only the order of the sums in a norm, in a
rotation and in a scale is torch's own: where a coordinate lies within rounding of a threshold, its
code may be the neighbouring one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy import linalg
from torch import Tensor

from turboquant_jax.pytorch import trellis
from turboquant_jax.pytorch.constants import CodecConstants, GroupConstants
from turboquant_jax.pytorch.sums import ordered_sum
from turboquant_jax.quantizers import codebook, trellis_codebook

Codes = tuple[Tensor, Tensor]
"""Indices uint8 [*vectors, channels] and scales bfloat16 [*vectors] of a group."""
Basis = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Matrix and inverse [rows, H, H], and variance [rows, H], of `quantizers.channels.Basis`."""
Search = Callable[[Tensor, Tensor, tuple[float, ...]], Tensor]
"""Indices of vectors, by the levels of a trellis as a tensor and as numbers."""


@dataclass(frozen=True, eq=False)
class Group:
    """A group of channels: its constants, and those of them that are tensors."""

    constants: GroupConstants
    levels: Tensor
    edges: Tensor
    matrix: Tensor | None
    signs: Tensor | None
    factors: tuple[Tensor, ...]

    def rotate(self, x: Tensor) -> Tensor:
        """Pi x of the last axis, float32."""
        if self.signs is not None:
            return self._hadamard(self.signs * x)
        return x if self.matrix is None else x @ self.matrix.T

    def unrotate(self, y: Tensor) -> Tensor:
        """Pi^T y of the last axis, float32."""
        if self.signs is not None:
            return self.signs * self._hadamard(y)
        return y if self.matrix is None else y @ self.matrix

    def _hadamard(self, x: Tensor) -> Tensor:
        """See `quantizers.rotation`: factors of at most 32, of which the block's H is made."""
        shape, order = x.shape, self.constants.rotation.block.bit_length() - 1
        for factor in self.factors:
            step = factor.shape[0].bit_length() - 1
            sizes = (*shape[:-1], shape[-1] >> order, 2**step, 2 ** (order - step))
            x = torch.einsum("...ij,ki->...kj", x.reshape(sizes), factor)
            order -= step
        return x.reshape(shape)

    def quantize(self, x: Tensor, search: Search) -> Codes:
        """Of float32 vectors; a vector that is not finite has scale NaN."""
        root, unit = split(x)
        z = self.rotate(unit)
        indices = self.assign(z, search)
        return indices, self.scale(root, z, indices)

    def assign(self, z: Tensor, search: Search) -> Tensor:
        """Indices of unit-variance coordinates; a tie goes to the lower level."""
        if self.constants.code == "trellis":
            return search(z, self.levels, self.constants.levels)
        return torch.bucketize(z.contiguous(), self.edges).to(torch.uint8)

    def scale(self, root: Tensor, z: Tensor, indices: Tensor) -> Tensor:
        """What codes of z are multiplied by, for vectors of root mean square `root`."""
        mode = self.constants.scale
        if mode == "norm":
            return root.to(torch.bfloat16)
        c = self.code_levels(indices)
        energy = ordered_sum(c * c)
        if mode == "matched":
            return (root * torch.sqrt(self.constants.dim / energy)).to(torch.bfloat16)
        overlap = ordered_sum(z * c)
        if mode == "least_squares":
            return (root * (overlap / energy)).to(torch.bfloat16)
        positive = overlap > 0
        factor = self.constants.dim / torch.where(positive, overlap, 1.0)
        return (root * torch.where(positive, factor, 1.0)).to(torch.bfloat16)

    def code_levels(self, indices: Tensor) -> Tensor:
        """The level of every coordinate, float32, unit variance."""
        if self.constants.code == "trellis":
            return self.levels[trellis.level_numbers(indices, self.constants.bits)]
        return self.levels[indices.long()]

    def dequantize(self, indices: Tensor, scale: Tensor) -> Tensor:
        """Vectors in the rotated space, float32."""
        return self.code_levels(indices) * scale.to(torch.float32)[..., None]


@dataclass(frozen=True, eq=False)
class Transform:
    """T and T^-T [rows, H, H] of calibrated channels, weights [rows, groups]; see

    `quantizers.channels`.
    """

    matrix: Tensor
    dual: Tensor
    weights: Tensor


@dataclass(frozen=True, eq=False)
class Codec:
    """Groups that follow each other; `order` int64 [rows, H] lists the channels group by group."""

    groups: tuple[Group, ...]
    order: Tensor | None = None
    inverse: Tensor | None = None
    transform: Transform | None = None

    @property
    def scale_count(self) -> int:
        """Scales of a vector."""
        return len(self.groups) if self.transform is None else 1

    def rotate_query(self, rows: slice, x: Tensor) -> Tensor:
        """What meets the vectors, [*batch, rows, H], into their rotated space, float32."""
        if self.transform is not None:
            return torch.einsum("...hj,hij->...hi", x.float(), self.transform.dual[rows])
        return self._each(Group.rotate, self._picked(self.order, rows, x.to(torch.float32)))

    def unrotate(self, rows: slice, y: Tensor) -> Tensor:
        """Vectors back from the rotated space, float32."""
        if self.transform is not None:
            return torch.einsum("...hi,hij->...hj", y, self.transform.dual[rows])
        return self._picked(self.inverse, rows, self._each(Group.unrotate, y))

    def quantize(
        self, rows: slice, x: Tensor, search: Search = trellis.search
    ) -> tuple[Codes, ...]:
        """Codes of every group, of vectors [*batch, rows, H]; `search` finds a trellis' paths."""
        if self.transform is not None:
            return self._quantize_jointly(self.transform, rows, x, search)
        parts = self._split(self._picked(self.order, rows, x.to(torch.float32)))
        return tuple(
            group.quantize(part, search) for group, part in zip(self.groups, parts, strict=True)
        )

    def dequantize(self, codes: Sequence[Codes]) -> Tensor:
        """Vectors in the rotated space, float32; NaN as a whole if the part of a group is."""
        parts = [group.dequantize(*own) for group, own in zip(self.groups, codes, strict=True)]
        return parts[0] if len(parts) == 1 else nan_unless_finite(torch.cat(parts, dim=-1))

    def _quantize_jointly(
        self, transform: Transform, rows: slice, x: Tensor, search: Search
    ) -> tuple[Codes, ...]:
        """Of calibrated channels: one scale for all groups, stored with each of them."""
        root, unit = split(x.to(torch.float32))
        turned = torch.einsum("...hj,hij->...hi", unit, transform.matrix[rows])
        size, z = split(turned)
        indices, overlap, energy = [], torch.zeros_like(root), torch.zeros_like(root)
        for g, (group, part) in enumerate(zip(self.groups, self._split(z), strict=True)):
            indices.append(group.assign(part, search))
            c, weight = group.code_levels(indices[-1]), transform.weights[rows, g]
            overlap = overlap + weight * ordered_sum(part * c)
            energy = energy + weight * ordered_sum(c * c)
        scale = (root * (size * (overlap / energy))).to(torch.bfloat16)
        return tuple((found, scale) for found in indices)

    def _each(self, function, x: Tensor) -> Tensor:
        parts = zip(self.groups, self._split(x), strict=True)
        return torch.cat([function(group, part) for group, part in parts], dim=-1)

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split([group.constants.dim for group in self.groups], dim=-1)

    def _picked(self, order: Tensor | None, rows: slice, x: Tensor) -> Tensor:
        if order is None:
            return x
        return torch.gather(x, -1, order[rows].expand(x.shape))


def create(
    constants: CodecConstants,
    order: np.ndarray | None,
    basis: Basis | None,
    device: torch.device,
) -> Codec:
    """The codec of these constants on a device.

    `order` of channels [rows, H], and `basis` of calibrated ones, or None.
    """

    def tensor(x: np.ndarray | None) -> Tensor | None:
        return None if x is None else torch.tensor(np.asarray(x), device=device)

    groups = []
    for own in constants.groups:
        levels = np.asarray(own.levels)
        edges = codebook.thresholds(levels).astype(np.float32)
        groups.append(
            Group(
                own,
                torch.tensor(levels.astype(np.float32), device=device),
                torch.tensor(edges, device=device),
                tensor(own.rotation.matrix),
                tensor(own.rotation.signs),
                tuple(torch.tensor(f, device=device) for f in _factors(own.rotation.block)),
            )
        )
    if constants.turn is not None:
        assert basis is not None
        made = _transform(constants, basis)
        return Codec(
            tuple(groups), transform=Transform(*(torch.tensor(x, device=device) for x in made))
        )
    if order is None:
        return Codec(tuple(groups))
    order = np.asarray(order, np.int64)
    return Codec(tuple(groups), tensor(order), tensor(np.argsort(order, axis=-1)))


def _transform(constants: CodecConstants, basis: Basis) -> list[np.ndarray]:
    """Matrix, dual and weights of `quantizers.channels.create`, float32."""
    turn = np.asarray(constants.turn, np.float64)
    matrix, inverse, variance = (np.asarray(x, np.float64) for x in basis)
    counts = [group.dim for group in constants.groups]
    edges = np.cumsum([0, *counts])
    square = np.stack(
        [variance[:, start:stop].mean(axis=1) for start, stop in pairwise(edges)], axis=1
    )
    deviation = np.sqrt(np.repeat(square, counts, axis=1))[..., None]
    weights = square ** (constants.power // 2)
    found = (
        np.einsum("ij,hkj->hik", turn, matrix) / deviation,
        np.einsum("ij,hjk->hik", turn, inverse) * deviation,
        weights / weights.max(axis=1, keepdims=True),
    )
    return [x.astype(np.float32) for x in found]


def grid_of(group: Group) -> tuple[tuple[int, ...], float] | None:
    """The levels of a group as integers times a step, which the kernels look up; None if off it."""
    own = group.constants
    limit = trellis_codebook.grid_limit(own.bits) if own.code == "trellis" else None
    return codebook.grid_integers(own.levels, limit)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Root mean square and direction of float32 vectors; see `quantizers.direction.split`."""
    largest = x.abs().amax(dim=-1)
    shrink = torch.where(largest > 1, 0.25, 1.0)
    usable = torch.isfinite(largest) & (largest > 0)
    divisor = torch.where(usable, largest * shrink, 1.0)
    x = torch.where(usable[..., None], x * shrink[..., None] / divisor[..., None], 0.0)
    square = (x * x).mean(dim=-1)
    root = torch.sqrt(torch.where(usable, square, 1.0))
    return torch.where(torch.isfinite(largest), largest * root, torch.nan), x / root[..., None]


def nan_unless_finite(x: Tensor) -> Tensor:
    """Vectors that hold NaN or infinity as NaN in every coordinate, all others as they are."""
    return torch.where(torch.isfinite(x).all(dim=-1, keepdim=True), x, torch.nan)


def _factors(block: int) -> list[np.ndarray]:
    order, found = block.bit_length() - 1, []
    while order > 0:
        step = min(order, 5)
        found.append(np.asarray(linalg.hadamard(2**step) / 2 ** (step / 2), np.float32))
        order -= step
    return found
