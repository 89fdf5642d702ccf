"""Trellis-coded quantization: 8 states, R bits per coordinate, a decoder without sequential state.

R bits choose among 2^(R+1) sorted levels L, twice the scalar alphabet: one trellis bit u[t] and R-1
level bits w[t]. The last trellis bits say which of four interleaved subsets (level number mod 4) is
in use, so neighbouring levels are never on offer together; the encoder searches all paths:

    c0[t] = u[t-2]    c1[t] = u[t] ^ u[t-1] ^ u[t-3]    q[t] = L[4 w[t] + 2 c1[t] + c0[t]]

with u[-1] = u[-2] = u[-3] = 0 and a free end state, so R * d bits are the whole code. This is the
8-state Ungerboeck code with parity checks (13, 04) octal (Ungerboeck 1982; Marcellin and Fischer
1990 quantize with it), written without feedback: generators 1 + D + D^3 and D^2.

Input is on the *unit-variance* scale: sqrt(d) times a unit vector, or d standard normals.
An index is a byte `w | u << (R-1)` below 2^R, packed like that of a scalar code.
"""

import math
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels import trellis as kernel
from turboquant_jax.implementation import Implementation, no_gpu, resolve
from turboquant_jax.quantizers.trellis_codebook import grid_levels as grid_levels
from turboquant_jax.quantizers.trellis_codebook import grid_limit as grid_limit
from turboquant_jax.quantizers.trellis_codebook import levels as levels

_STATES = 8  # state = u[t-1] + 2 u[t-2] + 4 u[t-3]

# _BRANCH[u3, u1 + 2 u2, u]: the subset 2 c1 + c0 that bit u selects after the bits u3, u2, u1.
_BRANCH = np.array(
    [[[2 * (u ^ u1 ^ u3) + u2 for u in (0, 1)] for u2 in (0, 1) for u1 in (0, 1)] for u3 in (0, 1)]
)


def encode(y: Float[Array, "*batch d"], bits: int) -> UInt8[Array, "*batch d"]:
    """The code of least squared error for every vector: Viterbi search, float32 path costs.

    Of equal costs the lower end state wins, then zeros among the older bits, newest first. A vector
    with a NaN, an infinity or an entry beyond 1e18 gets valid indices that mean nothing, and other
    vectors are untouched: indices cannot say so, the scale stored beside them must.
    Raises ValueError unless bits is 1, 2, 3 or 4.
    """
    return encode_with(y, jnp.asarray(levels(bits), jnp.float32))


@partial(jax.jit, static_argnames="bits")
def decode(indices: UInt8[Array, "*batch d"], bits: int) -> Float[Array, "*batch d"]:
    """The float32 levels that indices stand for; bits above the lowest `bits` are ignored.

    Raises ValueError unless bits is 1, 2, 3 or 4.
    """
    return decode_with(indices, jnp.asarray(levels(bits), jnp.float32))


def decode_with(
    indices: UInt8[Array, "*batch d"], table: Float[Array, " levels"]
) -> Float[Array, "*batch d"]:
    """`decode` with a table of 2^(R+1) levels of one's own."""
    return table[level_numbers(indices, table.shape[0].bit_length() - 2)]


def search(
    y: Float[Array, "*batch d"],
    levels: tuple[float, ...],
    *,
    implementation: Implementation | None = None,
) -> UInt8[Array, "*batch d"]:
    """`encode_with` levels that are known beforehand, which a kernel can take for constants.

    "xla" is the definition; "pallas" the GPU kernel; None takes the kernel where there is a GPU.

    Raises:
      ValueError: another implementation, or a number of levels that is no power of two from 4 on.
      NotImplementedError: "pallas" without a GPU.
    """
    if resolve(implementation, {"pallas": no_gpu(), "xla": None}) == "xla":
        return encode_with(y, jnp.asarray(levels, jnp.float32))
    return kernel.encode(_rows(y), levels).T.reshape(y.shape)


@jax.jit
def encode_with(
    y: Float[Array, "*batch d"], table: Float[Array, " levels"]
) -> UInt8[Array, "*batch d"]:
    """`encode` with any sorted table of 2^(R+1) levels, R from 1 to 8."""
    level_bits = table.shape[0].bit_length() - 3  # R - 1
    if table.shape != (4 << max(level_bits, 0),) or level_bits > 7:
        raise ValueError(f"table: got shape {table.shape}, expected 4, 8, 16, ... or 512 levels")
    y, table = y.astype(jnp.float32), table.astype(jnp.float32)
    trellis_bits = _trace_back(*_search(_rows(y), table)).T.reshape(y.shape)
    level_in_subset = _nearest_in_subset(y, _subsets(trellis_bits), table)
    return level_in_subset | (trellis_bits << level_bits)


@partial(jax.jit, static_argnames="bits")
def level_numbers(indices: UInt8[Array, "*batch d"], bits: int) -> Int[Array, "*batch d"]:
    """Which of the 2^(bits+1) sorted levels, 4 w + 2 c1 + c0, every index stands for (int32)."""
    within = indices & ((1 << (bits - 1)) - 1)
    return 4 * within.astype(jnp.int32) + _subsets((indices >> (bits - 1)) & 1).astype(jnp.int32)


def _rows(y: Float[Array, "*batch d"]) -> Float[Array, "d vectors"]:
    """Vectors on the trailing axis: every step of a search then works on whole rows."""
    return y.reshape(math.prod(y.shape[:-1]), y.shape[-1]).T


def _subsets(trellis_bits: UInt8[Array, "*batch d"]) -> UInt8[Array, "*batch d"]:
    """2 c1 + c0 of every coordinate: shifts and xors, no recursion."""

    def delayed(steps: int) -> UInt8[Array, "*batch d"]:
        front = [(0, 0)] * (trellis_bits.ndim - 1) + [(steps, 0)]
        return jnp.pad(trellis_bits, front)[..., : trellis_bits.shape[-1]]

    return ((trellis_bits ^ delayed(1) ^ delayed(3)) << 1) | delayed(2)


def _nearest_in_subset(
    y: Float[Array, "*batch d"], subset: UInt8[Array, "*batch d"], table: Float[Array, " levels"]
) -> UInt8[Array, "*batch d"]:
    """w of the nearest level 4 w + subset: how many midpoints of that subset lie below y."""
    which = subset.astype(jnp.int32)

    def above(midpoint: Float[Array, " 4"]) -> UInt8[Array, "*batch d"]:
        bar = lax.select_n(which, *(jnp.full(y.shape, midpoint[j]) for j in range(4)))
        return (y > bar).astype(jnp.uint8)

    midpoints = (table[4:] + table[:-4]).reshape(-1, 4) / 2
    return reduce(jnp.add, map(above, midpoints), jnp.zeros(y.shape, jnp.uint8))


def _search(
    rows: Float[Array, "d vectors"], table: Float[Array, " levels"]
) -> tuple[Float[Array, "states vectors"], UInt8[Array, "d vectors"]]:
    """Costs of the best path into every end state; per coordinate, bit s of a byte is u3 of the
    best path into state s."""
    rungs = table.reshape(-1, 4, 1)  # [w, subset]
    place = jnp.arange(_STATES, dtype=jnp.uint8)[:, None]

    def step(cost, y):
        # Not jnp.min over an axis of w: XLA's CPU code for that is up to 8 times slower.
        subset_cost = reduce(jnp.minimum, [jnp.square(y[None] - rung) for rung in rungs])
        # Old states u1 + 2 u2 + 4 u3 split into [u3, u1 + 2 u2]; with the new bit u as the fastest
        # axis, [u1 + 2 u2, u] is already the new state u + 2 u1 + 4 u2.
        zero, one = cost.reshape(2, _STATES // 2, 1, -1) + subset_cost[_BRANCH]
        survivor = (one < zero).reshape(_STATES, -1).astype(jnp.uint8)
        byte = jnp.sum(survivor << place, axis=0, dtype=jnp.uint8)
        return jnp.minimum(zero, one).reshape(_STATES, -1), byte

    start = jnp.full((_STATES, rows.shape[1]), jnp.inf, jnp.float32).at[0].set(0.0)
    return lax.scan(step, start, rows)


def _trace_back(
    cost: Float[Array, "states vectors"], survivors: UInt8[Array, "d vectors"]
) -> UInt8[Array, "d vectors"]:
    """The best path's trellis bits, from its end: the lowest bit of a state is the bit that led
    to it, and the survivor bit is what the state before it had beyond the reach of this one."""

    def step(state, byte):
        return (state >> 1) | (((byte >> state) & 1) << 2), state & 1

    best = jnp.argmin(cost, axis=0).astype(jnp.uint8)
    return lax.scan(step, best, survivors, reverse=True)[1]
