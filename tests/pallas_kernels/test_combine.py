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


def in_slots(parts, splits, counts):
    """The first `counts` splits of the sequences [B, K, n, ...] as the decode kernel leaves them.

    Slots that nobody wrote hold NaN.
    """
    batch, kv_heads = parts["peak"].shape[:2]
    usual = all(count == splits for count in counts)
    first = np.arange(batch) * (splits + 1) if usual else 1 + np.cumsum([0, *counts[:-1]])
    found = {"exact": parts["exact"]}
    for name in ("peak", "weight", "sums"):
        x = parts[name].swapaxes(0, 1)
        held = np.full((kv_heads, 1 + sum(counts) + batch * splits, *x.shape[3:]), np.nan)
        for j, count in enumerate(counts):
            held[:, first[j] : first[j] + count] = x[:, j, :count]
        found[name] = np.float32(held)
    table = np.stack([first, counts], axis=1).astype(np.int32)
    return found | {"dealt": np.broadcast_to(table, (kv_heads, batch, 2))}


@pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=GPU)])
@pytest.mark.parametrize(
    ("splits", "columns", "rotated", "dealt"),
    [
        (5, 4, True, None),  # one tile
        (19, 4, True, None),  # two kernels
        (19, 16, True, None),
        (130, 16, False, None),  # several tiles
        (5, 16, False, (5, 5)),  # dealt, as they would be in any case
        (5, 4, True, (13, 0)),
        (19, 8, True, (40, 19)),
    ],
)
def test_combine(splits, columns, rotated, dealt, interpret):
    random = np.random.default_rng(splits * columns)
    shape, heads = (2, 3), columns - 1
    part = {"peak": (columns,), "weight": (columns,), "sums": (CHANNELS, columns)}

    def new(*lead):
        return {name: random.normal(size=(*shape, *lead, *x)) for name, x in part.items()}

    counts = dealt or (splits, splits)
    parts = new(max(counts))
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
    several = splits * CHANNELS * min(columns, 8) > TILE
    assert several == (splits > 8)  # as the cases say
    slots = {name: x.swapaxes(0, 1) for name, x in parts.items() if name != "exact"}
    held = {name: x.reshape(x.shape[0], -1, *x.shape[3:]) for name, x in slots.items()}
    held = in_slots(parts, splits, counts) if dealt else held | {"exact": parts["exact"]}
    for j, count in enumerate(counts):
        for name, nothing in (("peak", -1e30), ("weight", 0.0), ("sums", 0.0)):
            parts[name][j, :, count:] = nothing

    with triton.interpreted(interpret):
        out, lse = combine(held, splits, jnp.asarray(sinks), rotation, heads, jnp.float32)

    every = np.pad(sinks, ((0, 0), (0, columns - heads)))
    right, sums = expected(parts, every[None], matrix)
    np.testing.assert_allclose(out, right[:, :, :heads], rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(lse, sums[:, :, :heads], rtol=1e-5, atol=1e-5)
