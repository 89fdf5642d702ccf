"""Trellis-coded quantization: 8 states, R bits per coordinate, a decoder without sequential state.

R bits choose among 2^(R+1) sorted levels L, twice the scalar alphabet: one trellis bit u[t] and R-1
level bits w[t]. The past trellis bits say which of four interleaved subsets (level index mod 4) is in
use, so that neighbouring levels are never on offer together, and the encoder searches all paths:

    c0[t] = u[t-2]    c1[t] = u[t] ^ u[t-1] ^ u[t-3]    q[t] = L[4 w[t] + 2 c1[t] + c0[t]]

with u[-1] = u[-2] = u[-3] = 0 and a free end state, so R * d bits are the whole code. This is the
8-state Ungerboeck code with parity checks (13, 04) octal (Ungerboeck 1982; Marcellin and Fischer 1990
use it for quantization), written without feedback: generators 1 + D + D^3 and D^2.

Input is on the *unit-variance* scale: sqrt(d) times a unit vector, or d standard normals.
An index is a byte `w | u << (R-1)` below 2^R, packed like a scalar code's.
"""

import math
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from turboquant_jax.trellis_levels import POSITIVE_LEVELS

_STATES = 8  # state = u[t-1] + 2 u[t-2] + 4 u[t-3]

# _BRANCH[u3, u1 + 2 u2, u] = the subset 2 c1 + c0 that bit u selects when the last bits were u1, u2, u3.
_BRANCH = np.array(
    [[[2 * (u ^ u1 ^ u3) + u2 for u in (0, 1)] for u2 in (0, 1) for u1 in (0, 1)] for u3 in (0, 1)]
)


def levels(bits: int) -> Float[np.ndarray, " levels"]:
    """The 2^(bits+1) trained levels, sorted, symmetric about 0, for unit-variance coordinates.

    Raises ValueError unless bits is 1, 2, 3 or 4.
    """
    if bits not in POSITIVE_LEVELS:
        raise ValueError(f"bits must be 1, 2, 3 or 4 for the trellis code, got {bits}")
    positive = np.array(POSITIVE_LEVELS[bits])
    return np.concatenate([-positive[::-1], positive])


def encode(y: Float[Array, "*batch d"], bits: int) -> UInt8[Array, "*batch d"]:
    """The code of least squared error for every vector: Viterbi search, float32 path costs.

    Equal costs go to the older bit 0, then to the lower end state. A vector with a NaN, an infinity or
    an entry beyond 1e18 gets valid indices that mean nothing (other vectors are untouched): the
    indices cannot say so, hence the scale stored beside them must. Raises ValueError as `levels` does.
    """
    return encode_with(y, jnp.asarray(levels(bits), jnp.float32))


def decode(indices: UInt8[Array, "*batch d"], bits: int) -> Float[Array, "*batch d"]:
    """The float32 levels that indices stand for; bits above the lowest `bits` are ignored."""
    return decode_with(indices, jnp.asarray(levels(bits), jnp.float32))


@jax.jit
def encode_with(
    y: Float[Array, "*batch d"], table: Float[Array, " levels"]
) -> UInt8[Array, "*batch d"]:
    """`encode` for any sorted table of 4, 8, 16, 32, ... levels (up to 512); used for training."""
    dim, vectors = y.shape[-1], math.prod(y.shape[:-1])
    y = y.astype(jnp.float32)
    table = table.astype(jnp.float32)
    # Vectors on the trailing axis: every step of the scan then works on whole rows.
    bits = _survivors_to_bits(*_search(y.reshape(vectors, dim).T, table))
    trellis_bits = bits.T.reshape(y.shape)
    level_bits = _nearest_in_subset(y, _subsets(trellis_bits), table)
    return level_bits | (trellis_bits << _level_bits(table))


@jax.jit
def decode_with(
    indices: UInt8[Array, "*batch d"], table: Float[Array, " levels"]
) -> Float[Array, "*batch d"]:
    """`decode` for any table of 4, 8, 16, 32, ... levels (up to 512)."""
    level_bits = _level_bits(table)
    subset = _subsets((indices >> level_bits) & 1).astype(jnp.int32)
    within = (indices & ((1 << level_bits) - 1)).astype(jnp.int32)
    return table.astype(jnp.float32)[4 * within + subset]


def _level_bits(table: Float[Array, " levels"]) -> int:
    """R - 1, from the 2^(R+1) levels of a table."""
    level_bits = table.shape[0].bit_length() - 3
    if table.ndim != 1 or not 0 <= level_bits <= 7 or table.shape[0] != 4 << level_bits:
        raise ValueError(f"levels must be 4, 8, 16, ... or 512 numbers, got shape {table.shape}")
    return level_bits


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
    midpoints = (table[4:] + table[:-4]) / 2  # row k, column j: between w = k and k + 1 of subset j
    which = subset.astype(jnp.int32)

    def above(row: Float[Array, " 4"]) -> UInt8[Array, "*batch d"]:
        return (y > lax.select_n(which, *(jnp.full(y.shape, row[j]) for j in range(4)))).astype(
            jnp.uint8
        )

    return reduce(jnp.add, map(above, midpoints.reshape(-1, 4)), jnp.zeros(y.shape, jnp.uint8))


def _search(
    rows: Float[Array, "d vectors"], table: Float[Array, " levels"]
) -> tuple[Float[Array, "states vectors"], UInt8[Array, "d vectors"]]:
    """Path costs of the end states, and per coordinate one byte whose bit s is u3 of state s's path."""
    place = jnp.arange(_STATES, dtype=jnp.uint8)[:, None]

    def step(cost, y):
        subset_cost = jnp.stack(
            [reduce(jnp.minimum, [jnp.square(y - c) for c in table[j::4]]) for j in range(4)]
        )
        # Old states (u1, u2, u3) lie as [u3, u1 + 2 u2]; appending the new bit u as the fastest axis
        # turns [u1 + 2 u2, u] into the new state u + 2 u1 + 4 u2 by a plain reshape.
        old, recent = cost.reshape(2, 4, 1, -1) + subset_cost[_BRANCH]
        survivor = (recent < old).reshape(_STATES, -1).astype(jnp.uint8)
        byte = jnp.sum(survivor << place, axis=0, dtype=jnp.uint8)
        return jnp.minimum(old, recent).reshape(_STATES, -1), byte

    start = jnp.full((_STATES, rows.shape[1]), jnp.inf, jnp.float32).at[0].set(0.0)
    return lax.scan(step, start, rows)


def _survivors_to_bits(
    cost: Float[Array, "states vectors"], survivors: UInt8[Array, "d vectors"]
) -> UInt8[Array, "d vectors"]:
    """Trace the best path back from its end: a state's lowest bit is the trellis bit that led to it."""

    def step(state, byte):
        return (state >> 1) | (((byte >> state) & 1) << 2), state & 1

    return lax.scan(step, jnp.argmin(cost, axis=0).astype(jnp.uint8), survivors, reverse=True)[1]
