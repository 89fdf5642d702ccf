"""From full-precision vectors of a layer to the quantizers' codes, group by group."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.scipy import linalg
from jax.tree_util import register_dataclass
from jaxtyping import Array, Float, Int, UInt8

from turboquant_jax.cache.config import CodecConfig
from turboquant_jax.implementation import Implementation
from turboquant_jax.quantizers import channels, direction, qjl
from turboquant_jax.quantizers import quantizer as quantizers
from turboquant_jax.quantizers.channels import Basis, Transform
from turboquant_jax.quantizers.qjl import Sketch
from turboquant_jax.quantizers.quantizer import Quantizer

Group = tuple[
    UInt8[Array, "*vectors _"] | Float[Array, "*vectors H"], Float[Array, "*vectors"] | None
]
"""Indices and scales of a group of channels; no scale where the first group's is that of all.

Behind those of the channels a sketch has one more: packed signs, and the norm of what they tell of.
Vectors in full precision are a group themselves, without a scale.
"""


@dataclass(frozen=True)
class Uncoded:
    """Vectors in full precision: how many channels they have, and their dtype."""

    dim: int
    dtype: str


@register_dataclass
@dataclass(frozen=True)
class Codec:
    """One quantizer per group of channels; `order` lists the channels group by group.

    `order` is int32 [rows, H], a row for each head of each layer, or None for the natural order;
    the functions say with `rows` whose channels they are given. The *rotated space* of a codec is
    the concatenation of its groups' rotated channels. A calibrated `transform` leads there instead,
    and leads queries elsewhere than the vectors that they meet (`quantizers.channels`).

    A `sketch` keeps what the groups leave of a vector, r = y - s c in the rotated space: the signs
    of S r, and |r|. They have a linear reconstruction, f |r| S^T sign(S r), which is added to s c:
    its product with a query is the unbiased estimate itself (`quantizers.qjl`).

    An `uncoded` codec has no groups: vectors stay what and where they are.
    """

    groups: tuple[Quantizer, ...]
    order: Int[Array, "rows H"] | None
    transform: Transform | None = None
    sketch: Sketch | None = None
    uncoded: Uncoded | None = field(default=None, metadata={"static": True})

    @property
    def scale_count(self) -> int:
        """Scales of a vector, but for the norm of a sketch."""
        return len(self.groups) if self.transform is None else 1

    def rotate_query(
        self, rows: Int[Array, " K"], x: Float[Array, "*batch K H"]
    ) -> Float[Array, "*batch K H"]:
        """What meets the vectors into their rotated space, float32: scores are computed there."""
        if self.uncoded is not None:
            return x.astype(jnp.float32)
        if self.transform is not None:
            return channels.apply(self.transform.dual[rows], x)
        parts = self._split(self._reorder(rows, x.astype(jnp.float32)))
        return jnp.concatenate(
            [group.rotation.apply(part) for group, part in zip(self.groups, parts, strict=True)], -1
        )

    def unrotate(
        self, rows: Int[Array, " K"], y: Float[Array, "*batch K H"]
    ) -> Float[Array, "*batch K H"]:
        """Vectors, or a sum of them, back from the rotated space, float32."""
        if self.uncoded is not None:
            return y.astype(jnp.float32)
        if self.transform is not None:
            return channels.apply(jnp.swapaxes(self.transform.dual[rows], 1, 2), y)
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
        """That of `rotate_query`, dense; transposed, that of `unrotate`.

        Of each head if they differ, in the order of their channels or calibrated, else of all.
        """
        if self.uncoded is not None:
            return jnp.eye(self.uncoded.dim)[None]
        if self.transform is not None:
            return self.transform.dual[rows]
        matrix = linalg.block_diag(*(group.rotation.matrix for group in self.groups))
        if self.order is None:
            return matrix[None]
        return jnp.moveaxis(matrix[:, jnp.argsort(self.order[rows], axis=-1)], 0, 1)

    def query_gain(self, rows: Int[Array, " K"]) -> Float[Array, "#K"]:
        """How many times its largest magnitude a query's may be in the rotated space."""
        if self.uncoded is not None:
            return jnp.ones(1)
        if self.transform is None:
            return jnp.full(1, sum(group.dim for group in self.groups) ** 0.5)
        return jnp.max(jnp.sum(jnp.abs(self.transform.dual[rows]), axis=2), axis=1)

    def sketch_query(self, rotated: Float[Array, "*batch H"]) -> Float[Array, "*batch H"]:
        """f S of queries in the rotated space: times the signs and |r| what these add to a score.

        Raises:
          ValueError: a codec without a sketch.
        """
        if self.sketch is None:
            raise ValueError("sketch: got none, expected a codec of the code prod")
        return self.sketch.factor * qjl.project(self.sketch, rotated)

    def quantize(
        self,
        rows: Int[Array, " K"],
        x: Float[Array, "*batch K H"],
        search: Implementation | None = None,
    ) -> tuple[Group, ...]:
        """Indices and scales of each group of channels; `search` finds the path of a trellis."""
        if self.uncoded is not None:
            return ((x.astype(self.uncoded.dtype), None),)
        if self.transform is not None:
            own = jax.tree.map(lambda leaf: leaf[rows], self.transform)
            indices, scale = channels.quantize(self.groups, own, x, implementation=search)
            return (indices[0], scale), *((rest, None) for rest in indices[1:])
        parts = self._split(self._reorder(rows, x))
        found = tuple(
            quantizers.quantize(group, part, implementation=search)
            for group, part in zip(self.groups, parts, strict=True)
        )
        return found if self.sketch is None else (*found, self._sketch_rest(rows, x, found))

    def dequantize(self, groups: tuple[Group, ...]) -> Float[Array, "*vectors H"]:
        """Vectors in the rotated space, float32; NaN as a whole if the part of a group is."""
        if self.sketch is not None:
            *_, (signs, norm) = groups
            assert norm is not None
            return self._of_groups(groups[:-1]) + qjl.decode(self.sketch, signs, norm)
        return self._of_groups(groups)

    def _of_groups(self, groups: tuple[Group, ...]) -> Float[Array, "*vectors H"]:
        if self.uncoded is not None:
            return groups[0][0].astype(jnp.float32)
        scales = [scale for _, scale in groups if scale is not None]
        scales = scales * (len(groups) // len(scales))
        parts = [
            quantizers.dequantize(group, indices, scale)
            for group, (indices, _), scale in zip(self.groups, groups, scales, strict=True)
        ]
        # the whole of one group is NaN, or nothing of it is
        if len(parts) == 1:
            return parts[0]
        return direction.nan_unless_finite(jnp.concatenate(parts, axis=-1))

    def _sketch_rest(self, rows, x, groups: tuple[Group, ...]) -> Group:
        """Of what these groups, as they are stored, leave of x: packed signs, and the norm.

        Of the direction of x, as squares of what is huge or tiny are out of range. A norm that the
        stored type does not reach is NaN: infinity would be a score of either sign.
        """
        assert self.sketch is not None
        root, unit = direction.split(x)
        size = jnp.where(root > 0, root, 1.0)
        relative = tuple(
            (indices, None if scale is None else scale.astype(jnp.float32) / size)
            for indices, scale in groups
        )
        rest = self.rotate_query(rows, unit) - self._of_groups(relative)
        signs, norm = qjl.encode(self.sketch, rest)
        norm = (root * norm).astype(self.groups[0].scale_dtype)
        return signs, jnp.where(jnp.isfinite(norm), norm, jnp.asarray(jnp.nan, norm.dtype))

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


def uncoded(dim: int, dtype: str) -> Codec:
    """The codec of vectors in full precision."""
    return Codec((), None, uncoded=Uncoded(dim, dtype))


def create(
    key: Array,
    config: CodecConfig,
    head_dim: int,
    order: Int[Array, "rows H"] | None = None,
    basis: Basis | None = None,
) -> Codec:
    """Draw the rotations of a codec. Joint scales need the `basis` of each row, and no order.

    Raises:
      ValueError: a codebook, code or rotation that the bits or the channels of a group rule out.
    """
    groups, sketch, code = config.first_stage(head_dim), None, config.code
    if code == "prod":
        key, of_sketch = jax.random.split(key)
        sketch, code = qjl.create(of_sketch, head_dim, kind=config.sketch), "scalar"
    if config.scales != "group":
        if basis is None or order is not None:
            raise ValueError(
                f"scales: got {config.scales!r} without a calibration or with an order of channels,"
                " expected a calibration, whose basis has its own order"
            )
        made, transform = channels.create(
            key,
            basis,
            groups,
            least="vector" if config.scales == "joint" else "product",
            rotation=config.rotation,
            codebook=config.codebook,
            code=code,
        )
        return Codec(made, None, transform)
    keys = jax.random.split(key, len(groups))
    return Codec(
        tuple(
            quantizers.create(
                subkey,
                channels,
                bits,
                rotation=config.rotation,
                codebook=config.codebook,
                code=code,
                scale=config.scale,
            )
            for subkey, (channels, bits) in zip(keys, groups, strict=True)
        ),
        order,
        sketch=sketch,
    )


def _broadcast(order, x):
    return jnp.broadcast_to(order.reshape((1,) * (x.ndim - 2) + order.shape), x.shape)
