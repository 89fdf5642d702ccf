"""One vector times a matrix: the call."""

import jax
from jaxtyping import Array, Float

from pallas_kernels.primitives import triton
from pallas_kernels.product.kernel import ROWS, WARPS, matrix_vector_kernel


def matrix_vector(
    weight: Float[Array, "N D"], x: Float[Array, "D"], bias: Float[Array, "N"] | None = None
) -> Float[Array, "N"]:
    """W x + b, of one 16-bit type, sums in float32.

    For the step of a single sequence, where a product is as fast as its matrix is read.

    Raises:
      ValueError: other types, or shapes that do not fit each other.
    """
    rows, channels = weight.shape
    types = {y.dtype for y in (weight, x, bias) if y is not None}
    if len(types) != 1 or weight.dtype.itemsize != 2:
        got = ", ".join(sorted(map(str, types)))
        raise ValueError(f"matrix, vector and bias: got {got}, expected one 16-bit type")
    if x.shape != (channels,) or (bias is not None and bias.shape != (rows,)):
        got = f"{x.shape} and {None if bias is None else bias.shape}"
        raise ValueError(f"vector and bias of {weight.shape}: got {got}")
    whole = {y.ndim: triton.BlockSpec(y.shape, _first(y.ndim)) for y in (weight, x)}
    own = triton.BlockSpec((rows,), _first(1))
    return triton.call(
        matrix_vector_kernel,
        triton.Launch((-(-rows // ROWS),), warps=WARPS, stages=1),
        in_specs=(whole[2], whole[1], None if bias is None else own),
        out_specs=own,
        out_shape=jax.ShapeDtypeStruct((rows,), weight.dtype),
        name="matrix_vector",
    )(weight, x, bias)


def _first(axes: int):
    return lambda i: (0,) * axes
