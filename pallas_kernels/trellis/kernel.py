"""Viterbi search of the 8-state trellis: a thread per vector, the eight path costs in registers.

The steps of a vector follow each other, vectors are independent. Forward, every step leaves one
byte, in the place of the index that it will become: bit s says which of its two predecessors the
best path into state s had. Backward, the best path is read off these bytes.

See `primitives.trellis` for the code; a state is u[t] + 2 u[t-1] + 4 u[t-2].
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.primitives import triton

STATES = 8
# Vectors of a program: one a thread of its only warp.
LANES = 32
# Steps of a turn of the loop: their loads are under way while the turn before computes.
STEPS = 8


def encode_kernel(rows: Any, out: Any, *, levels: tuple[float, ...]) -> None:
    """One program of the grid (vectors)."""
    count = rows.shape[0]
    vector = triton.program_id(0) * LANES + jnp.arange(LANES)
    exists = vector < rows.shape[1]
    steps = next(n for n in (STEPS, 4, 2, 1) if count % n == 0)
    turns = count // steps

    def fetch(ref: Any, turn: jax.Array) -> list[jax.Array]:
        at = [ref.at[turn * steps + i, vector] for i in range(steps)]
        return [triton.load(place, mask=exists, other=0) for place in at]

    def forward(turn: jax.Array, carry: tuple) -> tuple:
        costs, ys = carry
        ahead = fetch(rows, jnp.minimum(turn + 1, turns - 1))
        for i, y in enumerate(ys):
            costs, byte = _step(costs, _subset_costs(y, levels))
            triton.store(out.at[turn * steps + i, vector], byte.astype(jnp.uint8), mask=exists)
        return costs, ahead

    def backward(turn: jax.Array, carry: tuple) -> tuple:
        state, ys, survivors = carry
        turn = turns - 1 - turn
        before = jnp.maximum(turn - 1, 0)
        ahead = fetch(rows, before), fetch(out, before)
        for i in reversed(range(steps)):
            oldest = (survivors[i].astype(jnp.int32) >> state) & 1
            index = _index(state, oldest, ys[i], levels)
            triton.store(out.at[turn * steps + i, vector], index.astype(jnp.uint8), mask=exists)
            state = state >> 1 | oldest << 2
        return state, *ahead

    far = jnp.full((LANES,), jnp.inf, jnp.float32)
    costs = [jnp.zeros((LANES,), jnp.float32)] + [far] * (STATES - 1)
    costs, _ = lax.fori_loop(0, turns, forward, (costs, fetch(rows, jnp.int32(0))))
    best, state = costs[0], jnp.zeros((LANES,), jnp.int32)
    for s in range(1, STATES):
        state = jnp.where(costs[s] < best, s, state)
        best = jnp.minimum(best, costs[s])
    triton.barrier()
    last = jnp.int32(turns - 1)
    lax.fori_loop(0, turns, backward, (state, fetch(rows, last), fetch(out, last)))


def _subset_costs(y: jax.Array, levels: tuple[float, ...]) -> list[jax.Array]:
    """Squared distance to the nearest level of each subset, number mod 4."""
    distances = [jnp.abs(y - level) for level in levels]
    nearest = [functools.reduce(jnp.minimum, distances[subset::4]) for subset in range(4)]
    return [distance * distance for distance in nearest]


def _step(costs: list[jax.Array], subsets: list[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
    """Costs of the best paths one coordinate on, and which of two predecessors each of them had."""
    found, byte = [], jnp.zeros(subsets[0].shape, jnp.int32)
    for state in range(STATES):
        u, u1, u2 = state & 1, state >> 1 & 1, state >> 2
        zero, one = (costs[u1 + 2 * u2 + 4 * u3] + subsets[2 * (u ^ u1 ^ u3) + u2] for u3 in (0, 1))
        byte = byte | jnp.where(one < zero, 1 << state, 0)
        found.append(jnp.minimum(zero, one))
    return found, byte


def _index(
    state: jax.Array, oldest: jax.Array, y: jax.Array, levels: tuple[float, ...]
) -> jax.Array:
    """w | u << (R-1): the nearest level of the subset that the path selects, and its path bit."""
    u, u1, u2 = state & 1, state >> 1 & 1, state >> 2
    odd, upper = u2 == 1, (u ^ u1 ^ oldest) == 1
    w = jnp.zeros(y.shape, jnp.int32)
    for i in range(0, len(levels) - 4, 4):
        bars = [(levels[i + j] + levels[i + 4 + j]) / 2 for j in range(4)]
        lower_bar, upper_bar = (jnp.where(odd, bars[j + 1], bars[j]) for j in (0, 2))
        bar = jnp.where(upper, upper_bar, lower_bar)
        w = w + (y > bar).astype(jnp.int32)
    return w | u << (len(levels) // 4).bit_length() - 1
