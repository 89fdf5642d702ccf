"""Channels of a calibrated basis, in groups of different bits, with one scale a vector.

A vector x that meets a vector q in a product is coded as u = T x, and q is taken to T^-T q:

    T = D^-1 Pi B^T,    <T^-T q, T x> = <q, x>.

B is a basis whose channels x' = B^T x come by descending variance (`Basis`), split into groups of
their own bits. Pi has a rotation for each group, and D the group's deviation s_g, s_g^2 being the
mean variance of its channels. So every channel of u has variance 1, whatever its group, and

    z = u / rms(u),    c its codes, by group,    x~ = s T^-1 c,    <q, x~> = s <T^-T q, c>

with *one* stored scalar s for all groups, the least-squares one under weights w_g:

    s = rms(u) sum_g w_g <z_g, c_g> / sum_g w_g <c_g, c_g>.

w_g = s_g^2 makes the error of x' least. Where q' = B^-1 q has the variances that x' has, as in
`cache.calibration`, w_g = s_g^4 makes the error of the products least. The levels are those of the
whole dimension, because the root mean square is that of all groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy import linalg
from jax.tree_util import register_dataclass
from jaxtyping import Array, Float, UInt8

from turboquant_jax.implementation import Implementation
from turboquant_jax.quantizers import direction, rotation
from turboquant_jax.quantizers import quantizer as quantizers
from turboquant_jax.quantizers.quantizer import Quantizer

Least = Literal["vector", "product"]
"""The error that the scale makes least: w_g = s_g^2, or w_g = s_g^4."""


@register_dataclass
@dataclass(frozen=True)
class Basis:
    """Of each head: B, its inverse, and the variance of every channel of B^T x, descending."""

    matrix: Float[Array, "*heads H H"]
    inverse: Float[Array, "*heads H H"]
    variance: Float[Array, "*heads H"]


@register_dataclass
@dataclass(frozen=True)
class Transform:
    """Of each head what its vectors and what meets them is multiplied by, float32.

    Attributes:
      matrix: T, of the vectors that are coded.
      dual: T^-T, of the queries that meet them; transposed it leads back, x~ = dual^T (s c).
      weights: w_g of each group, relative to the largest.
    """

    matrix: Float[Array, "heads H H"]
    dual: Float[Array, "heads H H"]
    weights: Float[Array, "heads groups"]


def create(
    key: Array, basis: Basis, split: Sequence[tuple[int, int]], *, least: Least, **options: Any
) -> tuple[tuple[Quantizer, ...], Transform]:
    """The quantizer of each group, without a rotation, and the transform of each head.

    Args:
      key: random key of the groups' rotations, shared by all heads.
      basis: of the heads, [heads, ...].
      split: (channels, bits) of every group, in the order of the basis: the largest first.
      least: the error that the scale makes least.
      options: passed to `quantizer.create`; the rotation is that of every group.

    Raises:
      ValueError: groups that do not add up to the dimension, another `least`, or what
        `quantizer.create` refuses.
    """
    dim = basis.variance.shape[-1]
    if sum(count for count, _ in split) != dim:
        raise ValueError(f"split: got groups {tuple(split)}, expected {dim} channels in all")
    if least not in get_args(Least):
        raise ValueError(f"least: got {least!r}, expected one of {', '.join(get_args(Least))}")
    kind = options.pop("rotation", "haar")
    groups, turns = [], []
    for own, (count, bits) in zip(jax.random.split(key, len(split)), split, strict=True):
        whole = quantizers.create(own, dim, bits, rotation="identity", **options)
        groups.append(replace(whole, rotation=rotation.Identity(count)))
        turns.append(rotation.create(kind, own, count).matrix)
    edges = np.cumsum([0, *(count for count, _ in split)]).tolist()
    square = jnp.stack(
        [jnp.mean(basis.variance[:, start:stop], axis=1) for start, stop in pairwise(edges)], 1
    )  # s_g^2
    counts = np.diff(edges)
    deviation = jnp.sqrt(jnp.repeat(square, counts, axis=1, total_repeat_length=dim))[..., None]
    turn = linalg.block_diag(*turns)
    weights = square if least == "vector" else square * square
    return tuple(groups), Transform(
        jnp.einsum("ij,hkj->hik", turn, basis.matrix, precision="highest") / deviation,
        jnp.einsum("ij,hjk->hik", turn, basis.inverse, precision="highest") * deviation,
        weights / jnp.max(weights, axis=1, keepdims=True),
    )


def quantize(
    groups: tuple[Quantizer, ...],
    transform: Transform,
    x: Float[Array, "*batch heads H"],
    *,
    implementation: Implementation | None = None,
) -> tuple[tuple[UInt8[Array, "*batch heads _"], ...], Float[Array, "*batch heads"]]:
    """Indices of each group, and the scale of each vector; see `quantizer.quantize` for what is

    zero or not finite.
    """
    root, unit = direction.split(x)
    size, z = direction.split(apply(transform.matrix, unit))
    edges = np.cumsum([group.dim for group in groups]).tolist()
    parts = jnp.split(z, edges[:-1], axis=-1)
    indices = tuple(
        quantizers.assign(group, part, implementation=implementation)
        for group, part in zip(groups, parts, strict=True)
    )
    overlap = energy = jnp.zeros(root.shape, jnp.float32)
    for g, (group, part, found) in enumerate(zip(groups, parts, indices, strict=True)):
        c = quantizers.code_levels(group, found)
        weight = jnp.broadcast_to(transform.weights[:, g], root.shape)
        overlap = overlap + weight * quantizers.ordered_sum(part * c)
        energy = energy + weight * quantizers.ordered_sum(c * c)
    return indices, (root * (size * (overlap / energy))).astype(groups[0].scale_dtype)


def apply(
    matrix: Float[Array, "heads H H"], x: Float[Array, "*batch heads H"]
) -> Float[Array, "*batch heads H"]:
    """Every head's vectors times its matrix, in float32."""
    return jnp.einsum("...hj,hij->...hi", x.astype(jnp.float32), matrix, precision="highest")
