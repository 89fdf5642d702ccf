"""Rotations of the last axis: frozen pytrees that apply and invert themselves.

A random rotation makes every coordinate of a unit vector look like a coordinate of the uniform
sphere, for which `codebook` is optimal. Only Haar does so for *every* vector. One randomised
Hadamard does it on average over dense vectors; for very sparse ones the paper's upper bound fails
(a one-hot vector lands on +-1/sqrt(d) in every coordinate).
"""

from dataclasses import dataclass, field
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass
from jaxtyping import Array, Float
from scipy import linalg

from turboquant_jax.quantizers.formats import RotationKind as Kind


@register_dataclass
@dataclass(frozen=True)
class Identity:
    """No rotation: the ablation, and the form for weights that already hold the rotation."""

    dim: int = field(metadata={"static": True})

    @property
    def matrix(self) -> Float[Array, "d d"]:
        """Pi, dense."""
        return jnp.eye(self.dim)

    def apply(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """x itself."""
        return x

    def invert(self, y: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """y itself."""
        return y


@register_dataclass
@dataclass(frozen=True)
class Orthogonal:
    """A dense orthogonal matrix: Haar-distributed (the theorems' rotation) or learned."""

    matrix: Float[Array, "d d"]

    @property
    def dim(self) -> int:
        """Dimension d of the vectors it rotates."""
        return self.matrix.shape[-1]

    def apply(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """Pi x, in float32."""
        return jnp.einsum("...j,ij->...i", x, self.matrix, precision="highest")

    def invert(self, y: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """Pi^T y, in float32."""
        return jnp.einsum("...i,ij->...j", y, self.matrix, precision="highest")


@register_dataclass
@dataclass(frozen=True)
class Hadamard:
    """H diag(signs) in independent blocks of a power of two; one block unless told otherwise."""

    signs: Float[Array, " d"]
    block: int = field(metadata={"static": True})

    @property
    def dim(self) -> int:
        """Dimension d of the vectors it rotates."""
        return self.signs.shape[-1]

    @property
    def matrix(self) -> Float[Array, "d d"]:
        """Pi, dense."""
        return jnp.asarray(self.pattern) * self.signs[None, :]

    @property
    def pattern(self) -> np.ndarray:
        """H, dense float32 [d, d]: Pi without its signs."""
        block = linalg.hadamard(self.block) / np.sqrt(self.block)
        return np.kron(np.eye(self.dim // self.block), block).astype(np.float32)

    def apply(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """H (signs * x) in each block."""
        return _walsh_hadamard(_along_last(self.signs, x) * x, self.block)

    def invert(self, y: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """signs * (H y): H is its own inverse."""
        return _along_last(self.signs, y) * _walsh_hadamard(y, self.block)


Rotation = Identity | Orthogonal | Hadamard


def create(kind: Kind, key: Array, dim: int) -> Rotation:
    """Draw a rotation of vectors of dimension `dim`.

    Args:
      kind: "haar" (any dim; d x d product), "hadamard" (dim a power of two), "block_hadamard" (the
        largest power of two that divides dim, block by block: 96 = 3 x 32), or "identity".
      key: a JAX random key; the identity ignores it.
      dim: dimension of the vectors, at least 2.

    Raises:
      ValueError: an unknown kind, or a dim that this kind cannot serve.
    """
    if dim < 2:
        raise ValueError(f"dim: got {dim}, expected at least 2")
    if kind == "identity":
        return Identity(dim)
    if kind == "haar":
        return Orthogonal(jax.random.orthogonal(key, dim))
    if kind not in get_args(Kind):
        raise ValueError(f"rotation: got {kind!r}, expected one of {', '.join(get_args(Kind))}")
    block = dim & -dim
    if kind == "hadamard" and block != dim:
        raise ValueError(
            f"dim: got {dim}, expected a power of two for the rotation 'hadamard'; "
            "use 'haar' or 'block_hadamard'"
        )
    if block == 1:
        raise ValueError(
            f"dim: got {dim}, expected an even one for the rotation 'block_hadamard'; use 'haar'"
        )
    return Hadamard(jax.random.rademacher(key, (dim,), jnp.float32), block)


def default_kind(dim: int) -> Kind:
    """The rotation to take for vectors of dimension `dim` unless told otherwise.

    "hadamard" where it can be, for a power of two; "haar" elsewhere, which serves every dim and
    mixes all of it ("block_hadamard" mixes within its blocks alone).
    """
    return "hadamard" if dim & (dim - 1) == 0 else "haar"


def _along_last(v: Float[Array, " d"], x: Float[Array, "*batch d"]) -> Float[Array, "*ones d"]:
    """`v` with the rank of `x`, spelt out because rank promotion is an error in strict code."""
    return v.reshape((1,) * (x.ndim - 1) + v.shape)


def _walsh_hadamard(x: Float[Array, "*batch d"], block: int) -> Float[Array, "*batch d"]:
    """Orthonormal Walsh-Hadamard transform of each block of the last axis.

    H_block is a Kronecker product of factors of at most 32: a few small matrix products, which are
    faster than log2(block) butterflies where the batch is large.
    """
    shape, order = x.shape, block.bit_length() - 1
    while order > 0:
        step = min(order, 5)
        factor = np.asarray(linalg.hadamard(2**step) / 2 ** (step / 2), np.float32)
        # the digits of the index that are done count as batch, the ones to come as columns
        x = x.reshape(*shape[:-1], shape[-1] >> order, 2**step, 2 ** (order - step))
        x = jnp.einsum("...ij,ki->...kj", x, factor, precision="highest")
        order -= step
    return x.reshape(shape)
