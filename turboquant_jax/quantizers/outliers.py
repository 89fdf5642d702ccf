"""Mixed bits: outlier channels apart from the rest, each group a quantizer of its own.

The paper's 2.5 and 3.5 bits (arXiv:2504.19874, section 4.3) are two groups of channels, 32 at one
bit more than the other 96. Its labels count two 16-bit scales a vector: the payload is 2.25 and
3.25 bits (`MixedQuantizer.bits_per_coordinate`). A group of n channels has its own rotation and
norm, and levels of dimension *n*: dividing all of them by sqrt(128), as the released code does,
quadruples the error of the 32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass
from jaxtyping import Array, Float, Int

from turboquant_jax.quantizers import packing
from turboquant_jax.quantizers import quantizer as quantizers
from turboquant_jax.quantizers.quantizer import Codes, Quantizer


@register_dataclass
@dataclass(frozen=True)
class MixedQuantizer:
    """The order of the channels, outliers first, and a quantizer for each run of that order."""

    order: Int[Array, " d"]
    groups: tuple[Quantizer, ...]

    @property
    def dim(self) -> int:
        """Dimension d of the vectors."""
        return sum(group.dim for group in self.groups)

    def bits_per_coordinate(self, *, scales: bool) -> float:
        """Bits stored a coordinate, padding of the last bytes included; `order` is stored once.

        Args:
          scales: whether to count the stored scales too, one a group and vector.
        """
        total = sum(
            packing.plane_bytes(group.dim, width)
            for group in self.groups
            for width in group.plane_widths
        )
        if scales:
            total += sum(jnp.dtype(group.scale_dtype).itemsize for group in self.groups)
        return 8 * total / self.dim


@register_dataclass
@dataclass(frozen=True)
class MixedCodes:
    """Compressed vectors, group by group."""

    groups: tuple[Codes, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored, scales included."""
        return sum(group.nbytes for group in self.groups)


def select_channels(samples: Float[Array, "*batch d"]) -> Int[Array, " d"]:
    """All channels by descending second moment over sample vectors; ties keep their order."""
    flat = samples.astype(jnp.float32).reshape(-1, samples.shape[-1])
    return jnp.argsort(-jnp.mean(flat * flat, axis=0), stable=True)


def create(
    key: Array, order: Int[Array, " d"], split: Sequence[tuple[int, int]], **options: Any
) -> MixedQuantizer:
    """Make a quantizer of several groups of channels.

    Args:
      key: random key of the groups' rotations.
      order: a permutation of the d channels: `select_channels`, or any other.
      split: (channels, bits) of every group, in that order: ((32, 3), (96, 2)) is the paper's
        "2.5 bits" at d = 128, ((32, 4), (96, 3)) its "3.5".
      options: passed to `quantizer.create` of every group.

    Raises:
      ValueError: an order that is no permutation, or groups that do not add up to d.
    """
    channels = np.asarray(order)
    if channels.ndim != 1 or not np.array_equal(np.sort(channels), np.arange(channels.size)):
        raise ValueError(f"order: got {channels.tolist()}, expected a permutation of the channels")
    if sum(count for count, _ in split) != channels.size:
        raise ValueError(
            f"split: got groups {tuple(split)}, expected {channels.size} channels in all"
        )
    keys = jax.random.split(key, len(split))
    groups = (quantizers.create(k, count, bits, **options) for k, (count, bits) in zip(keys, split))
    return MixedQuantizer(jnp.asarray(channels, jnp.int32), tuple(groups))


def encode(quantizer: MixedQuantizer, x: Float[Array, "*batch d"]) -> MixedCodes:
    """Compress vectors of any leading shape; NaN or infinity spoils its own group only.

    Raises:
      ValueError: vectors of another dimension.
    """
    if x.shape[-1] != quantizer.dim:
        raise ValueError(f"vectors: got shape {x.shape}, expected dim {quantizer.dim}")
    edges = np.cumsum([0, *(group.dim for group in quantizer.groups)]).tolist()
    sorted_x = jnp.take(x, quantizer.order, axis=-1)
    return MixedCodes(
        tuple(
            quantizers.encode(group, sorted_x[..., start:stop])
            for group, (start, stop) in zip(quantizer.groups, pairwise(edges))
        )
    )


def decode(quantizer: MixedQuantizer, codes: MixedCodes) -> Float[Array, "*batch d"]:
    """x~ in float32, channels in their original order."""
    parts = [
        quantizers.decode(group, code)
        for group, code in zip(quantizer.groups, codes.groups, strict=True)
    ]
    return jnp.take(jnp.concatenate(parts, axis=-1), jnp.argsort(quantizer.order), axis=-1)
