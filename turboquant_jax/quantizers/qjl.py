"""QJL: the 1-bit sketch of a vector, and an unbiased inner product with it.

Only the signs of S x are kept, with the norm of x; the query keeps its real-valued sketch S v
(arXiv:2406.03482, Lemma 3.2). For m rows s_i,

    <v, x>  ~  f |x| <S v, sign(S x)>,      f = sqrt(pi/2) / (m kappa),

because E[<s, v> sign<s, x>] = <v, x> / |x| E|<s, x>| / |x|. kappa = 1 for N(0, 1) rows. For rows of
norm sqrt(d) that are uniform on their sphere it is `bounds.qjl_constant`, and the variance is 2.75
times smaller where they are orthogonal. The scale of the rows and the factor belong together:
N(0, 1/d) rows with this factor shrink the estimate by sqrt(d), the most common bug in the field.
"""

from dataclasses import dataclass, field
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass
from jaxtyping import Array, Float, UInt8

from turboquant_jax.quantizers import bounds, direction, packing
from turboquant_jax.quantizers.formats import SketchKind as Kind

SIGN_PLANE: packing.Widths = (1,)


@register_dataclass
@dataclass(frozen=True)
class Sketch:
    """The rows of S, of mean square 1 a coordinate; `kind` is static and decides kappa."""

    matrix: Float[Array, "m d"]
    kind: Kind = field(metadata={"static": True})

    @property
    def dim(self) -> int:
        """Dimension d of the vectors."""
        return self.matrix.shape[1]

    @property
    def rows(self) -> int:
        """Number of rows m, which is the number of sign bits a vector."""
        return self.matrix.shape[0]

    @property
    def factor(self) -> float:
        """f = sqrt(pi/2) / (m kappa)."""
        kappa = bounds.qjl_constant(self.dim) if self.kind == "orthogonal" else 1.0
        return float(np.sqrt(np.pi / 2) / (self.rows * kappa))


def create(key: Array, dim: int, rows: int | None = None, *, kind: Kind = "orthogonal") -> Sketch:
    """Draw a sketch of `rows` rows (`dim` of them unless told otherwise).

    Args:
      key: a JAX random key.
      dim: dimension d of the vectors, at least 2.
      rows: number of rows m, at least 1.
      kind: "gaussian", i.i.d. N(0, 1) entries (the papers), or "orthogonal", sqrt(d) times the
        rows of Haar matrices (the authors' code), independent ones stacked where m > d.

    Raises:
      ValueError: an argument outside what is listed.
    """
    rows = dim if rows is None else rows
    if dim < 2 or rows < 1:
        raise ValueError(f"dim and rows: got {dim} and {rows}, expected at least 2 and 1")
    if kind not in get_args(Kind):
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(get_args(Kind))}")
    if kind == "gaussian":
        return Sketch(jax.random.normal(key, (rows, dim)), kind)
    blocks = jax.random.orthogonal(key, dim, (-(-rows // dim),)).reshape(-1, dim)
    return Sketch(blocks[:rows] * np.float32(np.sqrt(dim)), kind)


def project(sketch: Sketch, v: Float[Array, "*batch d"]) -> Float[Array, "*batch m"]:
    """S v in float32: the real-valued sketch of a query.

    Raises:
      ValueError: vectors of another dimension.
    """
    if v.shape[-1] != sketch.dim:
        raise ValueError(f"vectors: got shape {v.shape}, expected dim {sketch.dim}")
    v = v.astype(jnp.float32)
    return jnp.einsum("...j,ij->...i", v, sketch.matrix, precision="highest")


def encode(
    sketch: Sketch, x: Float[Array, "*batch d"]
) -> tuple[UInt8[Array, "*batch bytes"], Float[Array, "*batch"]]:
    """Packed sign bits of S x (bit 1 is +1; sign(0) = +1) and |x| in float32.

    A zero vector has norm 0; one that holds NaN or infinity has norm NaN, and valid sign bits that
    mean nothing.
    """
    root, unit = direction.split(x)
    positive = (project(sketch, unit) >= 0).astype(jnp.uint8)
    (plane,) = packing.pack(positive, SIGN_PLANE)
    return plane, root * np.float32(np.sqrt(sketch.dim))


def signs(sketch: Sketch, plane: UInt8[Array, "*batch bytes"]) -> Float[Array, "*batch m"]:
    """sign(S x) as float32 +-1, from the packed bits."""
    positive = packing.unpack((plane,), SIGN_PLANE, sketch.rows)
    return jnp.where(positive > 0, jnp.float32(1), jnp.float32(-1))


def decode(
    sketch: Sketch, plane: UInt8[Array, "*batch bytes"], norm: Float[Array, "*batch"]
) -> Float[Array, "*batch d"]:
    """f |x| S^T sign(S x) in float32: unbiased, and longer than x (for inner products only)."""
    back = jnp.einsum("...i,ij->...j", signs(sketch, plane), sketch.matrix, precision="highest")
    return back * (sketch.factor * norm.astype(jnp.float32))[..., None]


def inner_product(
    sketch: Sketch,
    projected: Float[Array, "*queries m"],
    plane: UInt8[Array, "*batch bytes"],
    norm: Float[Array, "*batch"],
) -> Float[Array, "..."]:
    """Unbiased <v, x> [*queries, *batch] of all pairs, from `project(sketch, v)` and the codes."""
    score = jnp.tensordot(projected, signs(sketch, plane), axes=(-1, -1), precision="highest")
    weight = sketch.factor * norm.astype(jnp.float32)
    return score * weight.reshape((1,) * (projected.ndim - 1) + weight.shape)
