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
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import register_dataclass
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from turboquant_jax import codebook as codebooks
from turboquant_jax import packing, trellis
from turboquant_jax import rotation as rotations
from turboquant_jax.rotation import Rotation

ScaleMode = Literal["norm", "matched", "least_squares", "unbiased"]
Codebook = Literal["lloyd_max", "gaussian", "uniform", "grid"]
Code = Literal["scalar", "trellis"]
_static = partial(field, metadata={"static": True})


@register_dataclass
@dataclass(frozen=True)
class Quantizer:
    """What encoder and decoder share: a rotation, the levels, and how the scale is chosen.

    `levels` are ascending, on the unit-variance scale, static: `jit` specialises on them.
    """

    rotation: Rotation
    levels: tuple[float, ...] = _static()
    code: Code = _static(default="scalar")
    scale: ScaleMode = _static(default="least_squares")
    scale_dtype: DTypeLike = _static(default=jnp.bfloat16)

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
        if self.code == "scalar":
            return packing.widths(self.bits)
        return (packing.widths(self.bits - 1) if self.bits > 1 else ()) + (1,)


@register_dataclass
@dataclass(frozen=True)
class Codes:
    """Compressed vectors: bit planes along the channels, and one scale a vector.

    `planes[i]` is uint8 [*batch, bytes], `scale` is [*batch]; `dim` is static.
    """

    planes: packing.Planes
    scale: Float[Array, "*batch"]
    dim: int = _static()

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
        levels on the unit-variance scale. A trellis brings its own.
      code: "scalar", or "trellis" (8 states, a quarter to a third less error at the same bytes).
      scale: the per-vector scale mode, see the module.
      scale_dtype: how the scale is stored. bfloat16 has the range of float32 and adds 2.8e-6 to
        the relative error; float16 adds 4.3e-8 but overflows beyond a norm of 65504 sqrt(d).

    Raises:
      ValueError: an argument outside what is listed.
    """
    if scale not in get_args(ScaleMode):
        raise ValueError(f"scale must be one of {', '.join(get_args(ScaleMode))}, got {scale!r}")
    if code not in get_args(Code):
        raise ValueError(f"code must be one of {', '.join(get_args(Code))}, got {code!r}")
    if code == "trellis":
        if not (isinstance(codebook, str) and codebook == "lloyd_max"):
            raise ValueError("a trellis code has levels of its own: leave codebook as it is")
        levels = trellis.levels(bits)
    else:
        levels = _scalar_levels(codebook, bits, dim)
    return Quantizer(
        rotations.create(rotation, key, dim),
        tuple(float(level) for level in levels),
        code,
        scale,
        jnp.dtype(scale_dtype),
    )


def _scalar_levels(codebook: Codebook | np.ndarray, bits: int, dim: int) -> np.ndarray:
    if isinstance(codebook, str):
        if codebook not in get_args(Codebook):
            names = ", ".join(get_args(Codebook))
            raise ValueError(f"codebook must be one of {names}, or levels, got {codebook!r}")
        if codebook == "uniform":
            return codebooks.uniform(bits, dim)
        levels = codebooks.lloyd_max(bits, None if codebook == "gaussian" else dim)
        return codebooks.on_grid(levels, dim) if codebook == "grid" else levels
    levels = np.asarray(codebook, np.float64)
    if levels.shape != (2**bits,) or not np.all(np.diff(levels) > 0):
        raise ValueError(
            f"a codebook of {bits} bits has {2**bits} strictly ascending levels, "
            f"got {levels.tolist()}"
        )
    return levels


def quantize(
    quantizer: Quantizer, x: Float[Array, "*batch d"]
) -> tuple[UInt8[Array, "*batch d"], Float[Array, "*batch"]]:
    """Indices and scales of vectors, not yet packed.

    A zero vector has scale 0 and decodes to zeros. A vector that holds NaN or infinity has scale
    NaN and decodes to NaN in every coordinate; its neighbours are untouched.

    Raises:
      ValueError: vectors of another dimension.
    """
    norm, z = _normalize(quantizer, x)
    indices = assign(quantizer, z)
    scale = norm * _correction(quantizer, z, code_levels(quantizer, indices))
    return indices, scale.astype(quantizer.scale_dtype)


def dequantize(
    quantizer: Quantizer, indices: UInt8[Array, "*batch d"], scale: Float[Array, "*batch"]
) -> Float[Array, "*batch d"]:
    """s c: the vectors in the *rotated* space, float32, where attention can use them as they are."""
    return code_levels(quantizer, indices) * scale.astype(jnp.float32)[..., None]


def encode(quantizer: Quantizer, x: Float[Array, "*batch d"]) -> Codes:
    """Compress vectors of any leading shape; see `quantize` for zeros, NaN and infinity."""
    indices, scale = quantize(quantizer, x)
    return Codes(packing.pack(indices, quantizer.plane_widths), scale, quantizer.dim)


def decode(quantizer: Quantizer, codes: Codes) -> Float[Array, "*batch d"]:
    """x~ = s Pi^T c in float32."""
    indices = packing.unpack(codes.planes, quantizer.plane_widths, codes.dim)
    return quantizer.rotation.invert(dequantize(quantizer, indices, codes.scale))


def straight_through(quantizer: Quantizer, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """decode(encode(x)) with an unrounded scale, and identity gradients through the rounding.

    The gradient flows through the norm, the rotation and the scale; only the step from z to its
    code is replaced by the identity. So a rotation, or whatever makes x, can be trained.
    """
    norm, z = _normalize(quantizer, x)
    indices = lax.stop_gradient(assign(quantizer, lax.stop_gradient(z)))
    c = z + lax.stop_gradient(code_levels(quantizer, indices) - z)
    scale = norm * _correction(quantizer, z, c)
    return quantizer.rotation.invert(c * scale[..., None])


def assign(quantizer: Quantizer, z: Float[Array, "*batch d"]) -> UInt8[Array, "*batch d"]:
    """Indices of unit-variance coordinates; a tie goes to the lower level."""
    if quantizer.code == "trellis":
        return trellis.encode(z, quantizer.bits)
    edges = codebooks.thresholds(np.asarray(quantizer.levels)).astype(np.float32)
    if len(edges) > 15:
        return jnp.searchsorted(edges, z).astype(jnp.uint8)
    index = jnp.zeros(z.shape, jnp.uint8)
    for edge in edges:  # few comparisons that fuse into one pass beat a search
        index = index + (z > edge).astype(jnp.uint8)
    return index


def code_levels(
    quantizer: Quantizer, indices: UInt8[Array, "*batch d"]
) -> Float[Array, "*batch d"]:
    """c: the level of every coordinate, float32, unit variance."""
    if quantizer.code == "trellis":
        return trellis.decode(indices, quantizer.bits)
    return jnp.asarray(quantizer.levels, jnp.float32)[indices.astype(jnp.int32)]


def _normalize(
    quantizer: Quantizer, x: Float[Array, "*batch d"]
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch d"]]:
    """The norm over sqrt(d), NaN where x is not finite, and z; float32 throughout.

    The largest magnitude is taken out first, so that squares neither overflow nor vanish for any
    vector that float32 or bfloat16 can hold.
    """
    if x.shape[-1] != quantizer.dim:
        raise ValueError(f"vectors must have dim {quantizer.dim}, got shape {x.shape}")
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, initial=0.0)
    usable = jnp.isfinite(largest) & (largest > 0)
    x = jnp.where(usable[..., None], x / jnp.where(usable, largest, 1.0)[..., None], 0.0)
    square = jnp.sum(x * x, axis=-1)
    root = jnp.sqrt(jnp.where(usable, square, 1.0) / quantizer.dim)
    z = quantizer.rotation.apply(x / root[..., None])
    return jnp.where(jnp.isfinite(largest), largest * root, jnp.nan), z


def _correction(
    quantizer: Quantizer, z: Float[Array, "*batch d"], c: Float[Array, "*batch d"]
) -> Float[Array, "*batch"]:
    """s sqrt(d) / |x| of the scale mode."""
    if quantizer.scale == "norm":
        return jnp.ones(z.shape[:-1], jnp.float32)
    energy = jnp.sum(c * c, axis=-1)
    if quantizer.scale == "matched":
        return jnp.sqrt(quantizer.dim / energy)
    overlap = jnp.sum(z * c, axis=-1)
    if quantizer.scale == "least_squares":
        return overlap / energy
    # <z, c> > 0 for every nearest-level code; a trellis path could in principle break it
    return jnp.where(overlap > 0, quantizer.dim / jnp.where(overlap > 0, overlap, 1.0), 1.0)
