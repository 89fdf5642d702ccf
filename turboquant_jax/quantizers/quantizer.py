"""TurboQuant-mse: normalize -> rotate -> quantize each coordinate -> pack, and back.

For x with norm |x|, z = sqrt(d) Pi x / |x| has unit-variance coordinates, c is its code (the
nearest level of each coordinate, or the best path of a trellis), and

    x~ = s Pi^T c,      one stored scalar s a vector.

`s` is where published variants differ, at no cost when decoding (TurboQuant, arXiv:2504.19874,
Algorithm 1; the EDEN note, arXiv:2604.18555):

    norm            s = |x| / sqrt(d)                        the paper
    matched         s = |x| / |c|                            |x~| = |x|
    least_squares   s = |x| / sqrt(d)  <z, c> / <c, c>       <x - x~, x~> = 0, the least error
    unbiased        s = |x| / sqrt(d)  d / <z, c>            <x, x~> = |x|^2, slope 1 under Haar
"""

from dataclasses import dataclass, field
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import register_dataclass
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from turboquant_jax.implementation import Implementation
from turboquant_jax.quantizers import codebook as codebooks
from turboquant_jax.quantizers import direction, formats, packing, trellis
from turboquant_jax.quantizers import rotation as rotations
from turboquant_jax.quantizers.formats import Code as Code
from turboquant_jax.quantizers.formats import Codebook as Codebook
from turboquant_jax.quantizers.formats import ScaleMode as ScaleMode
from turboquant_jax.quantizers.rotation import Rotation


@register_dataclass
@dataclass(frozen=True)
class Quantizer:
    """What encoder and decoder share: a rotation, the levels, and how the scale is chosen.

    `levels` are ascending, on the unit-variance scale, static: `jit` specialises on them.
    """

    rotation: Rotation
    levels: tuple[float, ...] = field(metadata={"static": True})
    code: Code = field(default="scalar", metadata={"static": True})
    scale: ScaleMode = field(default="least_squares", metadata={"static": True})
    scale_dtype: DTypeLike = field(default=jnp.bfloat16, metadata={"static": True})

    @property
    def dim(self) -> int:
        """Dimension d of the vectors."""
        return self.rotation.dim

    @property
    def bits(self) -> int:
        """Payload b in bits per coordinate; a trellis has twice the levels of a scalar code."""
        return (len(self.levels) - 1).bit_length() - (self.code == "trellis")

    @property
    def plane_widths(self) -> packing.Widths:
        """Bit planes of an index; a trellis keeps its path bit in a plane of its own."""
        return formats.plane_widths(self.code, self.bits)


@register_dataclass
@dataclass(frozen=True)
class Codes:
    """Compressed vectors: bit planes along the channels, and one scale a vector.

    `planes[i]` is uint8 [*batch, bytes], `scale` is [*batch]; `dim` is static.
    """

    planes: packing.Planes
    scale: Float[Array, "*batch"]
    dim: int = field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored, scales included."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


def create(
    key: Array,
    dim: int,
    bits: int,
    *,
    rotation: rotations.Kind = "haar",
    codebook: Codebook | np.ndarray = "lloyd_max",
    code: Code = "scalar",
    scale: ScaleMode = "least_squares",
    scale_dtype: DTypeLike = jnp.bfloat16,
) -> Quantizer:
    """Make a quantizer for vectors of dimension `dim` at `bits` bits per coordinate.

    Args:
      key: random key of the rotation.
      dim: dimension d of the vectors.
      bits: bits per coordinate, 1-8 (1-4 for a trellis).
      rotation: see `rotation.create`; "haar" is the theorems' one and serves every dim.
      codebook: "lloyd_max" for the exact sphere coordinate, "gaussian" for its limit, "uniform",
        "grid" (Lloyd-Max on the 7-bit grid that the GPU kernels look up), or 2**bits ascending
        levels on the unit-variance scale. A trellis brings its own, trained ("lloyd_max") or,
        from these, on the grid ("grid").
      code: "scalar", or "trellis" (8 states, a quarter to a third less error at the same bytes).
      scale: the per-vector scale mode, see the module.
      scale_dtype: how the scale is stored. bfloat16 has the range of float32 and adds 2.8e-6 to
        the relative error; float16 adds 4.3e-8 but overflows beyond a norm of 65504 sqrt(d).

    Raises:
      ValueError: an argument outside what is listed.
    """
    if scale not in get_args(ScaleMode):
        raise ValueError(f"scale: got {scale!r}, expected one of {', '.join(get_args(ScaleMode))}")
    found = formats.levels(code, codebook, bits, dim)
    return Quantizer(
        rotations.create(rotation, key, dim),
        found,
        code,
        scale,
        jnp.dtype(scale_dtype),
    )


def quantize(
    quantizer: Quantizer,
    x: Float[Array, "*batch d"],
    *,
    implementation: Implementation | None = None,
) -> tuple[UInt8[Array, "*batch d"], Float[Array, "*batch"]]:
    """Indices and scales of vectors, not yet packed.

    A zero vector has scale 0 and decodes to zeros. A vector that holds NaN or infinity has scale
    NaN and decodes to NaN in every coordinate; its neighbours are untouched.

    Raises:
      ValueError: vectors of another dimension.
    """
    norm, z = normalize(quantizer, x)
    indices = assign(quantizer, z, implementation=implementation)
    scale = norm * correction(quantizer, z, code_levels(quantizer, indices))
    return indices, scale.astype(quantizer.scale_dtype)


def dequantize(
    quantizer: Quantizer, indices: UInt8[Array, "*batch d"], scale: Float[Array, "*batch"]
) -> Float[Array, "*batch d"]:
    """s c: vectors in the *rotated* space, float32, where attention can use them as they are."""
    return code_levels(quantizer, indices) * _column(scale)


def encode(
    quantizer: Quantizer,
    x: Float[Array, "*batch d"],
    *,
    implementation: Implementation | None = None,
) -> Codes:
    """Compress vectors of any leading shape; see `quantize` for zeros, NaN and infinity."""
    indices, scale = quantize(quantizer, x, implementation=implementation)
    return Codes(packing.pack(indices, quantizer.plane_widths), scale, quantizer.dim)


def decode(quantizer: Quantizer, codes: Codes) -> Float[Array, "*batch d"]:
    """x~ = s Pi^T c in float32."""
    indices = packing.unpack(codes.planes, quantizer.plane_widths, codes.dim)
    # scaled last: s c may overflow where x~ does not
    return quantizer.rotation.invert(code_levels(quantizer, indices)) * _column(codes.scale)


def straight_through(
    quantizer: Quantizer,
    x: Float[Array, "*batch d"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch d"]:
    """decode(encode(x)) with an unrounded scale, and identity gradients through the rounding.

    The gradient flows through the norm, the rotation and the scale; only the step from z to its
    code is replaced by the identity. So whatever makes x can be trained. A rotation cannot be: with
    identity gradients the error |x - x~| does not depend on it (learning holds the codes fixed).
    """
    norm, z = normalize(quantizer, x)
    found = assign(quantizer, lax.stop_gradient(z), implementation=implementation)
    indices = lax.stop_gradient(found)
    c = z + lax.stop_gradient(code_levels(quantizer, indices) - z)
    scale = norm * correction(quantizer, z, c)
    return quantizer.rotation.invert(c) * _column(scale)


def assign(
    quantizer: Quantizer,
    z: Float[Array, "*batch d"],
    *,
    implementation: Implementation | None = None,
) -> UInt8[Array, "*batch d"]:
    """Indices of unit-variance coordinates; a tie goes to the lower level.

    `implementation` is that of `trellis.search`; scalar codes have one.
    """
    if quantizer.code == "trellis":
        return trellis.search(z, quantizer.levels, implementation=implementation)
    edges = codebooks.thresholds(np.asarray(quantizer.levels)).astype(np.float32)
    if len(edges) <= 31:  # few comparisons that fuse into one pass beat a search
        return sum(((z > edge).astype(jnp.uint8) for edge in edges), jnp.zeros(z.shape, jnp.uint8))
    step, table = len(quantizer.levels) // 2, jnp.asarray(edges)
    index = jnp.where(z > edges[step - 1], jnp.uint8(step), jnp.uint8(0))
    while step > 1:  # a binary search in one pass: jnp.searchsorted is ten times slower here
        step //= 2
        edge = table[index.astype(jnp.int32) + (step - 1)]
        index = index + jnp.where(z > edge, jnp.uint8(step), jnp.uint8(0))
    return index


def code_levels(
    quantizer: Quantizer, indices: UInt8[Array, "*batch d"]
) -> Float[Array, "*batch d"]:
    """c: the level of every coordinate, float32, unit variance."""
    if quantizer.code == "trellis":
        return trellis.decode_with(indices, jnp.asarray(quantizer.levels, jnp.float32))
    levels = np.asarray(quantizer.levels, np.float32)
    if len(levels) > 16:
        return jnp.asarray(levels)[indices.astype(jnp.int32)]
    c = jnp.full(indices.shape, levels[0])
    for below, level in enumerate(levels[1:]):  # selects fuse with what follows, a gather does not
        c = jnp.where(indices > jnp.uint8(below), level, c)
    return c


def normalize(
    quantizer: Quantizer, x: Float[Array, "*batch d"]
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch d"]]:
    """|x| / sqrt(d), and z: unit-variance coordinates in the rotated space; see `direction`.

    Raises:
      ValueError: vectors of another dimension.
    """
    if x.shape[-1] != quantizer.dim:
        raise ValueError(f"vectors: got shape {x.shape}, expected dim {quantizer.dim}")
    root, unit = direction.split(x)
    return root, quantizer.rotation.apply(unit)


def correction(
    quantizer: Quantizer, z: Float[Array, "*batch d"], c: Float[Array, "*batch d"]
) -> Float[Array, "*batch"]:
    """s sqrt(d) / |x| of the scale mode."""
    if quantizer.scale == "norm":
        return jnp.ones(z.shape[:-1], jnp.float32)
    energy = ordered_sum(c * c)
    if quantizer.scale == "matched":
        return jnp.sqrt(quantizer.dim / energy)
    overlap = ordered_sum(z * c)
    if quantizer.scale == "least_squares":
        return overlap / energy
    # <z, c> > 0 for every nearest-level code; a trellis path could in principle break it
    return jnp.where(overlap > 0, quantizer.dim / jnp.where(overlap > 0, overlap, 1.0), 1.0)


def ordered_sum(x: Float[Array, "*batch n"]) -> Float[Array, "*batch"]:
    """Over the last axis, by halves: XLA's own sums have an order that depends on the shape.

    Tokens that come one by one, or to a shard of a cache, would now and then have another last bit
    of their scale than the same tokens in a chunk.
    """
    while (count := x.shape[-1]) > 1:
        first, last = x[..., : count // 2], x[..., -(count // 2) :]
        middle = x[..., count // 2 : count - count // 2]  # of an odd number
        x = jnp.concatenate([first + last, middle], axis=-1)
    return jnp.sum(x, axis=-1)  # of one, or of none


def _column(scale: Float[Array, "*batch"]) -> Float[Array, "*batch 1"]:
    return scale.astype(jnp.float32)[..., None]
