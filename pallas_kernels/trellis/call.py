"""The search for the best path of a trellis: the call."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pallas_kernels.primitives import triton
from pallas_kernels.trellis.kernel import LANES, encode_kernel


def encode(rows: Float[Array, "d vectors"], levels: tuple[float, ...]) -> UInt8[Array, "d vectors"]:
    """Indices w | u << (R-1) of the paths of least squared error, every column a vector of its own.

    `levels`: the 2^(R+1) sorted levels, R from 1 to 8. Costs are float32 sums in the order of the
    coordinates; of equal costs the lower end state wins, then zeros among the older bits, newest
    first. Raises ValueError.
    """
    if len(levels) not in [4 << r for r in range(8)]:
        raise ValueError(f"levels: got {len(levels)}, expected 4, 8, 16, ... or 512")
    whole = triton.BlockSpec(rows.shape, lambda i: (0, 0))
    return triton.call(
        functools.partial(encode_kernel, levels=levels),
        triton.Launch((-(-rows.shape[1] // LANES),), warps=1, stages=1),
        in_specs=[whole],
        out_specs=whole,
        out_shape=jax.ShapeDtypeStruct(rows.shape, jnp.uint8),
        name="trellis_encode",
    )(rows.astype(jnp.float32))
