"""The merge of splits against float64: one tile of them, several tiles, and two kernels.

Equally many of each sequence, or as many as were dealt.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention.combine import TILE, combine
from pallas_kernels.primitives import triton
from pallas_kernels.primitives.rotation import RotationOperand
from tests.marks import GPU

CHANNELS = 128


def expected(parts, sinks, matrix):
    """Output and log-sum-exp of all columns, [B, K, columns, H] and [B, K, columns]."""
    peak, weight, sums = (np.float64(parts[name]) for name in ("peak", "weight", "sums"))
    outer = np.float64(parts["exact"]["peak"])
    top = np.maximum(peak.max(axis=2), outer)
    top = np.maximum(top, sinks * np.log2(np.e))
    share, own = np.exp2(peak - top[:, :, None]), np.exp2(outer - top)
    total = (weight * share).sum(axis=2) + parts["exact"]["weight"] * own
    total += np.exp2(sinks * np.log2(np.e) - top)
    out = np.einsum("ij,bkic->bkjc", matrix, (sums * share[:, :, :, None]).sum(axis=2))
    out = out + parts["exact"]["sums"] * own[:, :, None]
    return (out / total[:, :, None]).swapaxes(2, 3), np.log(total) + top / np.log2(np.e)


def in_slots(parts, splits, dealt):
    """The splits [B, K, n, ...] as the decode kernel leaves them, `splits` of each sequence first.

    Slots that nobody wrote hold NaN. Where they are dealt, the second sequence has half as many.
    """
    batch, kv_heads, count = parts["peak"].shape[:3]
    own, more = min(splits, count), batch * splits
    found, table = {}, np.zeros((kv_heads, batch, 2), np.int32)
    for name in ("peak", "weight", "sums"):
        x = parts[name].swapaxes(0, 1)
        held = np.full((kv_heads, 2 * more + batch * count, *x.shape[3:]), np.nan, np.float32)
        place = more
        for j in range(batch):
            there = count // 2 if dealt and j == 1 else count
            table[:, j] = there, place
            first = min(own, there)
            held[:, j * splits : j * splits + first] = x[:, j, :first]
            held[:, place : place + there - first] = x[:, j, first:there]
            place += there - first
        found[name] = held if dealt else held[:, :more]
    return found | {"exact": parts["exact"]} | ({"dealt": table} if dealt else {})


@pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=GPU)])
@pytest.mark.parametrize(
    ("splits", "columns", "rotated", "usual"),
    [
        (5, 4, True, 5),  # one tile
        (19, 4, True, 19),  # two kernels
        (19, 16, True, 19),
        (130, 16, False, 130),  # several tiles
        (5, 16, False, 5),
        (13, 4, True, 5),  # dealt: more than a tile
        (90, 8, True, 19),
        (40, 16, False, 30),
    ],
)
def test_combine(splits, columns, rotated, usual, interpret):
    random = np.random.default_rng(splits * columns)
    shape, heads = (2, 3), columns - 1
    part = {"peak": (columns,), "weight": (columns,), "sums": (CHANNELS, columns)}

    def new(*lead):
        return {name: random.normal(size=(*shape, *lead, *x)) for name, x in part.items()}

    parts = new(splits)
    parts |= {"peak": 4 * parts["peak"], "exact": new()}
    parts["weight"] = abs(parts["weight"])
    parts["weight"][:, :, ::3] = 0.0  # splits without tokens
    parts["peak"][:, :, ::3], parts["sums"][:, :, ::3] = -1e30, 0.0
    parts["exact"]["weight"] = abs(parts["exact"]["weight"])
    parts = {
        name: {n: np.float32(y) for n, y in x.items()} if name == "exact" else np.float32(x)
        for name, x in parts.items()
    }
    sinks = np.float32(random.normal(size=(shape[1], heads)))
    rotation, matrix = None, np.eye(CHANNELS)
    if rotated:
        signs = random.choice([-1.0, 1.0], size=(1, 1, CHANNELS, CHANNELS))
        rotation = RotationOperand(jnp.asarray(signs, jnp.bfloat16), gain=CHANNELS**-0.5)
        matrix = signs[0, 0] * CHANNELS**-0.5
    several = usual * CHANNELS * min(columns, 8) > TILE
    assert several == (usual > 8)  # as the cases say
    held = in_slots(parts, usual, splits != usual)
    if "dealt" in held:
        gone = slice(splits // 2, None)
        parts["peak"][1, :, gone], parts["weight"][1, :, gone] = -1e30, 0.0
        parts["sums"][1, :, gone] = 0.0

    with triton.interpreted(interpret):
        out, lse = combine(held, usual, jnp.asarray(sinks), rotation, heads, jnp.float32)

    every = np.pad(sinks, ((0, 0), (0, columns - heads)))
    right, sums = expected(parts, every[None], matrix)
    np.testing.assert_allclose(out, right[:, :, :heads], rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(lse, sums[:, :, :heads], rtol=1e-5, atol=1e-5)
