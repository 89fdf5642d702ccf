"""OSCAR and Block-GTQ against numpy and theory."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.fidelity import informed
from experiments.fidelity.forcing import cut
from experiments.fidelity.losses import measure, subject
from experiments.harness import prepared
from turboquant_jax.quantizers.codebook import distortion, lloyd_max


@pytest.fixture(scope="module")
def known():
    """Of the tiny model on two texts of random tokens."""
    return informed.moments(prepared.model("tiny"), prepared.random_texts(2, 50))


def test_moments_sum_over_tokens_and_texts(known):
    q, k, v = np.random.default_rng(0).normal(size=(3, 7, 2, 64)).astype(np.float32)
    q = np.stack([q, 2 * q], axis=2).reshape(7, 4, 64)  # two query heads of each kv head
    of_q, of_k, of_v = np.asarray(informed._moments(*map(jnp.asarray, (q, k, v))))
    for head in range(2):
        queries = 5 * q[:, 2 * head].T @ q[:, 2 * head]
        np.testing.assert_allclose(of_q[head], queries, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(of_k[head], k[:, head].T @ k[:, head], rtol=1e-4, atol=1e-3)
        weights = [key @ queries @ key for key in k[:, head]]
        values = sum(w * np.outer(x, x) for w, x in zip(weights, v[:, head], strict=True))
        np.testing.assert_allclose(of_v[head], values, rtol=1e-4, atol=1e-1)
    assert known.queries.shape == (2, 2, 64, 64) and known.share == 2
    once = informed.moments(prepared.model("tiny"), prepared.random_texts(2, 50)[:1])
    again = informed.moments(prepared.model("tiny"), prepared.random_texts(2, 50)[1:])
    np.testing.assert_allclose(known.keys, once.keys + again.keys, rtol=1e-5, atol=1e-5)


def test_greedy_bits_are_the_best():
    score = np.random.default_rng(1).uniform(0.01, 10, size=(3, 4))
    for own, bits in zip(score, informed.greedy(score, 2), strict=True):
        every = [b for b in itertools.product(range(1, 9), repeat=4) if sum(b) == 8]
        least = min(every, key=lambda b: float(own @ 4.0 ** -np.array(b)))
        assert tuple(bits) == least
    assert informed.greedy(np.array([[1e9, 1.0]]), 5).tolist() == [[8, 2]]  # 8 is the most


def test_block_gtq_loses_what_its_levels_do():
    """Each group has the error of Lloyd-Max levels in its dimension, and pairs share bits."""
    bits = np.array([[[4] * 8 + [1] * 24]])
    trip = informed._block_gtq(bits, 2, 0)[0][0]
    x = np.random.default_rng(2).normal(size=(1, 4000, 1, 64)) * np.geomspace(5, 0.1, 64)
    off = np.asarray(trip(jnp.asarray(x, jnp.float32))) - x
    which = np.tile(bits[0, 0] == 4, 2)
    for own, part in ((4, which), (1, ~which)):
        size = int(part.sum())
        lost = np.sum(off[..., part] ** 2) / np.sum(x[..., part] ** 2)
        assert lost == pytest.approx(distortion(lloyd_max(own, size), size), rel=0.05)


def test_oscar_clips_and_has_four_levels(known):
    trip = informed._oscar(known, 0)[0][1]
    turn = np.asarray(trip.keywords["turn"])
    np.testing.assert_allclose(turn @ turn.swapaxes(1, 2), np.stack([np.eye(64)] * 2), atol=1e-5)
    moment = np.einsum("kij,kil,kjm->klm", known.queries[1], turn, turn)
    energy = np.diagonal(moment, axis1=1, axis2=2)
    np.testing.assert_allclose(energy, energy.mean(1, keepdims=True).repeat(64, 1), rtol=1e-3)
    x = np.random.default_rng(3).normal(size=(1, 5, 2, 64)).astype(np.float32)
    back = np.einsum("btki,kij->btkj", trip(jnp.asarray(x)), turn)
    turned = np.einsum("btki,kij->btkj", x, turn)
    for got, own in zip(back.reshape(-1, 64), turned.reshape(-1, 64), strict=True):
        assert len(np.unique(got.round(4))) == 4
        assert np.abs(got).max() == pytest.approx(np.sort(np.abs(own))[61], rel=2e-3)


def test_bytes_and_losses(known):
    """Bytes are codes, norms or steps, and the matrices; both lose, with and without a window."""
    found = {one.preset: one for one in informed.informed(known)}
    oscar = found["OSCAR int2 w128 sinks4"]
    tokens, vectors = 65536, 2 * 2 * 2
    codes = vectors * (64 * 2 / 8 + 4)
    exact = found["OSCAR int2 w128 sinks4"].bytes_per_token(prepared.TINY, tokens)
    assert exact == pytest.approx(codes + 2 * 2 * 2 * 64 * 64 / tokens, rel=0.02)
    assert found["Block-GTQ K3 V2"].key.bits == 3
    texts = {"a": prepared.random_texts(2, 60)}
    held = subject(cut(prepared.model("tiny"), dtype="float32"), texts, 200)
    for name in ("OSCAR int2 w128 sinks4", "Block-GTQ K2 V2"):
        few = oscar.__class__(**{**vars(found[name]), "window": 8, "block": 8})
        kl = measure(held, few, [0, 1]).kl
        assert len(kl) == (1 if "OSCAR" in name else 2) and kl.mean() > 1e-4
