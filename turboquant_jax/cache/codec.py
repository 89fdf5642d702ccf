"""From full-precision vectors of a layer to the quantizers' codes, group by group."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.scipy import linalg
from jax.tree_util import register_dataclass
from jaxtyping import Array, Float, Int, UInt8

from turboquant_jax.cache.config import CodecConfig
from turboquant_jax.implementation import Implementation
from turboquant_jax.quantizers import quantizer as quantizers
from turboquant_jax.quantizers.direction import nan_unless_finite
from turboquant_jax.quantizers.quantizer import Quantizer

Group = tuple[UInt8[Array, "*vectors _"], Float[Array, "*vectors"]]


@register_dataclass
@dataclass(frozen=True)
class Codec:
    """One quantizer per group of channels; `order` lists the channels group by group.

    `order` is int32 [rows, H], a row for each head of each layer, or None for the natural order;
    the functions say with `rows` whose channels they are given. The *rotated space* of a codec is
    the concatenation of its groups' rotated channels.
    """

    groups: tuple[Quantizer, ...]
    order: Int[Array, "rows H"] | None

    def rotate(
        self, rows: Int[Array, " K"], x: Float[Array, "*batch K H"]
    ) -> Float[Array, "*batch K H"]:
        """Into the rotated space, float32: scores and outputs are computed there."""
        parts = self._split(self._reorder(rows, x.astype(jnp.float32)))
        return jnp.concatenate(
            [group.rotation.apply(part) for group, part in zip(self.groups, parts, strict=True)], -1
        )

    def unrotate(
        self, rows: Int[Array, " K"], y: Float[Array, "*batch K H"]
    ) -> Float[Array, "*batch K H"]:
        """Back from the rotated space, float32."""
        parts = self._split(y)
        x = jnp.concatenate(
            [group.rotation.invert(part) for group, part in zip(self.groups, parts, strict=True)],
            -1,
        )
        if self.order is None:
            return x
        order = jnp.argsort(self.order[rows], axis=-1)
        return jnp.take_along_axis(x, _broadcast(order, x), axis=-1)

    def matrix(self, rows: Int[Array, " K"]) -> Float[Array, "heads H H"]:
        """The whole rotation, dense: of each head if their channels are ordered, else of all."""
        matrix = linalg.block_diag(*(group.rotation.matrix for group in self.groups))
        if self.order is None:
            return matrix[None]
        return jnp.moveaxis(matrix[:, jnp.argsort(self.order[rows], axis=-1)], 0, 1)

    def quantize(
        self,
        rows: Int[Array, " K"],
        x: Float[Array, "*batch K H"],
        search: Implementation | None = None,
    ) -> tuple[Group, ...]:
        """Indices and scales of each group of channels; `search` finds the path of a trellis."""
        parts = self._split(self._reorder(rows, x))
        return tuple(
            quantizers.quantize(group, part, implementation=search)
            for group, part in zip(self.groups, parts, strict=True)
        )

    def dequantize(self, groups: tuple[Group, ...]) -> Float[Array, "*vectors H"]:
        """Vectors in the rotated space, float32; NaN as a whole if the part of a group is."""
        parts = [
            quantizers.dequantize(group, indices, scale)
            for group, (indices, scale) in zip(self.groups, groups, strict=True)
        ]
        # the whole of one group is NaN, or nothing of it is
        return parts[0] if len(parts) == 1 else nan_unless_finite(jnp.concatenate(parts, axis=-1))

    def _reorder(self, rows, x):
        if self.order is None:
            return x
        return jnp.take_along_axis(x, _broadcast(self.order[rows], x), axis=-1)

    def _split(self, x):
        edges, parts = 0, []
        for group in self.groups:
            parts.append(x[..., edges : edges + group.dim])
            edges += group.dim
        return parts


def create(
    key: Array, config: CodecConfig, head_dim: int, order: Int[Array, "rows H"] | None = None
) -> Codec:
    """Draw the rotations of a codec.

    Raises:
      ValueError: a codebook, code or rotation that the bits or the channels of a group rule out.
    """
    groups = config.groups(head_dim)
    keys = jax.random.split(key, len(groups))
    return Codec(
        tuple(
            quantizers.create(
                subkey,
                channels,
                bits,
                rotation=config.rotation,
                codebook=config.codebook,
                code=config.code,
                scale=config.scale,
            )
            for subkey, (channels, bits) in zip(keys, groups, strict=True)
        ),
        order,
    )


def _broadcast(order, x):
    return jnp.broadcast_to(order.reshape((1,) * (x.ndim - 2) + order.shape), x.shape)
