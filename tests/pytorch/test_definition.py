"""Attention in torch is attention in JAX, over caches of the same bits."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.layout import CODEC, QUICK, SMALL, calibration
from tests.pytorch.equal import adopt
from tests.pytorch.skip import torch
from turboquant_jax import cache
from turboquant_jax.attention import Scores as JaxScores
from turboquant_jax.attention import attend
from turboquant_jax.pytorch import creation, definition, sharing, updating
from turboquant_jax.pytorch.segments import Scores

CAPACITY, SEED, COUNTS = 70, 2, np.array([61, 0, 30], np.int32)
FREQUENCIES = tuple(10_000.0 ** -(np.arange(8) / 8))
PLAIN = cache.CacheConfig(head_dim=16, key=CODEC(4), value=CODEC(3), **SMALL)
CASES = {
    "scalar": (replace(PLAIN, rope_frequencies=FREQUENCIES), {}),
    "trellis, cap, sink logits": (
        replace(PLAIN, key=CODEC(2, code="trellis"), value=CODEC(2, code="trellis")),
        dict(softcap=0.7, scale=0.4),
    ),
    "heads, sliding": (
        replace(
            PLAIN,
            allocation=cache.Allocation(((4, 2), 8), ((2, 2), 5)),
            sliding_window=23,
            rope_frequencies=FREQUENCIES[:3],
        ),
        {},
    ),
    "calibrated": (
        replace(
            PLAIN,
            key=CODEC(((8, 4), (8, 2)), scales="joint_products"),
            value=CODEC(((8, 4), (8, 2)), scales="joint"),
        ),
        {},
    ),
    "groups in an order": (
        replace(PLAIN, key=CODEC(((8, 4), (8, 2))), value=CODEC(((8, 4), (8, 2)))),
        {},
    ),
}


@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("name", CASES)
def test_attention(name, count, monkeypatch):
    monkeypatch.setattr(definition, "SCORES", 5000)  # a chunk in several parts
    config, options = CASES[name]
    rng = np.random.default_rng(4)
    order = rng.permuted(np.broadcast_to(np.arange(16, dtype=np.int32), (2, 2, 16)), axis=-1)
    orders = (order, order) if "order" in name else (None, None)
    own = dict.fromkeys(("key_order", "value_order"), jnp.asarray(order)) if "order" in name else {}
    known = calibration(config)
    theirs = cache.create(config, 3, CAPACITY, key=jax.random.key(SEED), calibration=known, **own)
    ours = creation.create(config, 3, CAPACITY, seed=SEED, orders=orders, calibration=known)
    k, v = (rng.normal(1, 1, (2, 3, 61, 2, 16)).astype(np.float32) for _ in "kv")
    logits = rng.normal(0, 1, 4).astype(np.float32) if "sink" in name else None
    append = jax.jit(partial(cache.append, implementation="xla"), compiler_options=QUICK)
    theirs = append(theirs, jnp.asarray(k), jnp.asarray(v), jnp.asarray(COUNTS))
    adopt(ours, theirs)
    q = rng.normal(0, 1, (3, count, 4, 16)).astype(np.float32)
    new = [rng.normal(1, 1, (3, count, 2, 16)).astype(np.float32) for _ in "kv"]
    run = jax.jit(
        partial(attend, layer=1, scores=JaxScores(**options), implementation="xla"),
        compiler_options=QUICK,
    )
    expected = run(
        theirs, q=q, k=new[0], v=new[1], sink_logits=None if logits is None else jnp.asarray(logits)
    )
    got = definition.attend(
        ours, 1, *map(torch.from_numpy, (q, *new)), Scores(**options),
        None if logits is None else torch.from_numpy(logits),
    )  # fmt: skip
    np.testing.assert_allclose(expected, got, rtol=2e-5, atol=2e-5)


def test_sequences_reordered_at_once():
    """Row b is what row source[b] was, goes on alone, and takes nothing from the others."""
    config = replace(PLAIN, rope_frequencies=FREQUENCIES)
    generator = torch.Generator().manual_seed(0)
    k, v, q = (torch.randn(2, 3, 60, n, 16, generator=generator) + 1 for n in (2, 2, 4))
    source = torch.tensor([2, 0, 2])
    ours, fresh = (creation.create(config, 3, CAPACITY, seed=SEED) for _ in "ab")
    counts = torch.tensor([30, 20, 40])
    updating.append(ours, k[:, :, :40], v[:, :, :40], counts)
    sharing.reorder(ours, source)
    assert ours.table.references.max() == 2
    updating.append(fresh, k[:, source, :40], v[:, source, :40], counts[source])
    for each in (ours, fresh):
        updating.append(each, k[:, :, 40:], v[:, :, 40:])
    assert not ours.table.overflow.any() and ours.table.lengths.tolist() == [60, 50, 60]
    new = torch.ones(3, 1, 2, 16)
    expected, got = (
        definition.attend(each, 1, q[1, :, :1], new, new, Scores()) for each in (fresh, ours)
    )
    torch.testing.assert_close(expected, got)
    sharing.clear(ours)
    empty = creation.create(config, 3, CAPACITY, seed=SEED)
    for name, tensor in vars(empty.table).items():
        assert torch.equal(tensor, getattr(ours.table, name)), name


def test_what_is_not_finite_is_seen_and_nothing_else():
    ours = creation.create(PLAIN, 1, CAPACITY, seed=SEED)
    k, v = torch.ones(2, 1, 40, 2, 16), torch.ones(2, 1, 40, 2, 16)
    v[:, 0, 39, 0, 3] = torch.nan  # in the window
    updating.append(ours, k, v)
    q, new = torch.ones(1, 2, 4, 16), torch.ones(1, 2, 2, 16)
    new[0, 1, 1, 0] = torch.inf  # of the second query alone
    out = definition.attend(ours, 0, q, new, torch.ones_like(new), Scores())
    spoilt = out.isnan()
    assert spoilt[0, :, :2, 3].all() and spoilt[0, 1, 2:].all()
    assert spoilt.sum() == 2 * 2 + 2 * 16
