"""Arrays as the kernels take them: all layers as one, rotations in parts of 16 bits.

A rotation is a matrix in parts that 16-bit products lose nothing of.
"""

from collections.abc import Sequence
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_attention import CodebookOperand, PhasesOperand
from pallas_kernels.rope import RotationOperand
from turboquant_jax.cache.codec import Codec
from turboquant_jax.cache.layout import Share
from turboquant_jax.cache.pre_rope import Phases
from turboquant_jax.cache.state import LayerRows
from turboquant_jax.quantizers import codebook as codebooks
from turboquant_jax.quantizers import trellis
from turboquant_jax.quantizers.quantizer import Quantizer
from turboquant_jax.quantizers.rotation import Hadamard, Rotation


def flat(x: Array) -> Array:
    """The layers as more of what a layer has."""
    return x.reshape(-1, *x.shape[2:])


def of_phases(phases: Phases, share: Share | None = None) -> PhasesOperand:
    """The tables of a cache; those of a period in bytes, cosine and sine of a pair side by side.

    On a share whose blocks are counted through, a stripe has a row of the coarse one.
    """
    coarse = phases.coarse
    if share is not None:
        stripe = jnp.arange(coarse.shape[0] // share.count + 1)
        coarse = jnp.take(coarse, stripe * share.count + share.index, axis=0, mode="clip")
    pairs = jnp.stack(jnp.split(phases.within, 2, axis=1), axis=-1)
    within = pairs.reshape(phases.within.shape).astype(jnp.int8)
    return PhasesOperand(coarse, phases.fine, within, phases.rotary)


def of_rotation(rotation: Rotation, dtype: DTypeLike) -> RotationOperand:
    """One rotation for vectors of this dtype: exact in bfloat16, in float32 for all others."""
    if isinstance(rotation, Hadamard):
        # +-1, a constant of the program; the signs are applied to the vectors
        pattern = np.sign(np.asarray(rotation.pattern))
        return RotationOperand(
            jnp.asarray(pattern, _dtype(dtype))[None, None], rotation.signs, rotation.block**-0.5
        )
    return _split(rotation.matrix[None], dtype)


def of_codec(codec: Codec, rows: Int[Array, " K"]) -> RotationOperand:
    """`Codec.matrix` of some rows in bfloat16 parts: for queries, or transposed for outputs."""
    if codec.uncoded is not None:  # what rotates queries on their way has to be given one
        return RotationOperand(jnp.eye(codec.uncoded.dim, dtype=jnp.bfloat16)[None, None])
    if len(codec.groups) == 1 and codec.order is None and codec.transform is None:
        return of_rotation(codec.groups[0].rotation, jnp.bfloat16)
    return _split(codec.matrix(rows), jnp.bfloat16)


def of_layer(rows: LayerRows, codecs: Sequence[Codec], kv_heads: int) -> RotationOperand:
    """`of_codec` of all heads of a layer, whose members have these codecs."""
    own = [member.of(kv_heads) for member in rows.members]
    if len(own) == 1:
        return of_codec(codecs[0], own[0])
    plain = [of_codec(*pair) for pair in zip(codecs, own, strict=True)]
    if len({operand.gain for operand in plain}) > 1 or any(len(x.parts) > 1 for x in plain):
        dense = [codec.matrix(heads) for codec, heads in zip(codecs, own, strict=True)]
        return _split(
            rows.join([_of_each(x, own[i]) for i, x in enumerate(dense)], 0), jnp.bfloat16
        )
    parts = [_of_each(with_signs(x).parts[0], own[i]) for i, x in enumerate(plain)]
    return RotationOperand(rows.join(parts, axis=0)[None], gain=plain[0].gain)


def _of_each(matrices: Float[Array, "heads H H"], rows: Int[Array, " K"]) -> Array:
    """Those of all heads, where there is one for all."""
    return jnp.broadcast_to(matrices, (rows.shape[0], *matrices.shape[1:]))


def with_signs(operand: RotationOperand) -> RotationOperand:
    """The same with the signs in the matrix."""
    if operand.signs is None:
        return operand
    signs = operand.signs.astype(operand.parts.dtype)[None, None, None, :]
    return replace(operand, parts=operand.parts * signs, signs=None)


def codebook_of(group: Quantizer) -> CodebookOperand | None:
    """The levels of a quantizer as integers times a step, or None if they are not."""
    limit = trellis.grid_limit(group.bits) if group.code == "trellis" else None
    integers = codebooks.grid_integers(group.levels, limit)
    return None if integers is None else CodebookOperand(group.bits, *integers, group.code)


def _split(matrix: Float[Array, "heads H H"], dtype: DTypeLike) -> RotationOperand:
    if _dtype(dtype) == jnp.float32:
        return RotationOperand(matrix[None])
    parts, rest = [], matrix
    for _ in range(3):
        # not by a conversion there and back, which XLA takes for nothing
        part = lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        rest = rest - part
    return RotationOperand(jnp.stack(parts))


def _dtype(dtype: DTypeLike) -> DTypeLike:
    return jnp.bfloat16 if jnp.dtype(dtype) == jnp.bfloat16 else jnp.float32
