"""Rotations: orthogonal to float32 rounding, the right law, and what each cannot serve."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

from turboquant_jax.quantizers import rotation

KEY = jax.random.key(3)
SERVED = [
    ("haar", 2),
    ("haar", 3),
    ("haar", 80),
    ("haar", 576),
    ("hadamard", 2),
    ("hadamard", 128),
    ("hadamard", 4096),
    ("block_hadamard", 80),
    ("block_hadamard", 96),
    ("block_hadamard", 576),
    ("block_hadamard", 1536),
    ("identity", 5),
]


def dense(turn: rotation.Rotation) -> np.ndarray:
    """The matrix of a rotation, from what it does to the unit vectors."""
    return np.asarray(turn.apply(jnp.eye(turn.dim))).T


@pytest.mark.parametrize(("kind", "dim"), SERVED)
def test_rotations_keep_inner_products_and_invert(kind, dim):
    turn = rotation.create(kind, KEY, dim)
    assert turn.dim == dim
    x = np.random.default_rng(4).normal(size=(2, 3, dim)).astype(np.float32)
    y, back, forth = jax.jit(
        lambda turn, x: (turn.apply(x), turn.invert(turn.apply(x)), turn.apply(turn.invert(x)))
    )(turn, x)
    assert y.shape == x.shape and y.dtype == jnp.float32
    np.testing.assert_allclose(back, x, atol=1e-5)
    np.testing.assert_allclose(forth, x, atol=1e-5)
    for pairs in ("abi,abi->ab", "abi,cbi->abc"):
        np.testing.assert_allclose(
            np.einsum(pairs, y, y), np.einsum(pairs, x, x), rtol=1e-5, atol=1e-5 * dim**0.5
        )


@pytest.mark.parametrize("kind", ["haar", "hadamard"])
def test_jit_vmap_and_grad_change_nothing(kind):
    turn = rotation.create(kind, KEY, 32)
    x = jax.random.normal(jax.random.key(4), (5, 32))
    expected = x @ dense(turn).T
    chex.assert_trees_all_close(turn.apply(x), expected, atol=1e-5)
    chex.assert_trees_all_close(jax.jit(lambda t, x: t.apply(x))(turn, x), expected, atol=1e-5)
    chex.assert_trees_all_close(jax.vmap(turn.apply)(x), expected, atol=1e-5)
    back = jax.vjp(turn.apply, x)[1](x)[0]  # the transpose of a rotation is its inverse
    chex.assert_trees_all_close(back, turn.invert(x), atol=1e-5)


@pytest.mark.parametrize("dim", [2, 64, 1024, 4096])
def test_hadamard_is_the_textbook_matrix(dim):
    turn = rotation.create("hadamard", KEY, dim)
    x = np.random.default_rng(4).normal(size=(2, dim)).astype(np.float32)
    expected = (x * np.asarray(turn.signs)[None]) @ (linalg.hadamard(dim) / dim**0.5)
    np.testing.assert_allclose(jax.jit(type(turn).apply)(turn, x), expected, atol=2e-5)


def test_block_hadamard_mixes_within_blocks_only():
    got = dense(rotation.create("block_hadamard", KEY, 96))
    blocks = linalg.block_diag(*[np.ones((32, 32))] * 3)
    np.testing.assert_allclose(np.abs(got), blocks / np.sqrt(32), atol=1e-6)


def test_haar_is_haar():
    """E tr = 0 and E tr^2 = 1 on O(d); QR without the sign correction breaks both (4 s.e.)."""

    def trace(matrices) -> np.ndarray:
        return np.trace(matrices, axis1=-2, axis2=-1)

    def is_haar(traces: np.ndarray) -> bool:
        return all(
            abs(np.mean(v) - mean) < 4 * np.std(v) / np.sqrt(len(v))
            for v, mean in ((traces, 0), (traces**2, 1))
        )

    keys = jax.random.split(jax.random.key(6), 2000)
    drawn = jax.vmap(lambda key: rotation.create("haar", key, 4).matrix)(keys)
    assert is_haar(trace(np.asarray(drawn)))
    uncorrected = np.linalg.qr(np.random.default_rng(0).normal(size=(2000, 4, 4)))[0]
    assert not is_haar(trace(uncorrected))


def test_one_hot_vectors_stay_flat_under_hadamard():
    """Every coordinate is +-1 / sqrt(d): the input on which one Hadamard is no random rotation."""
    y = rotation.create("hadamard", KEY, 64).apply(jnp.eye(64)[7])
    np.testing.assert_allclose(np.abs(y), 1 / 8, atol=1e-6)


def test_bad_arguments_are_named():
    with pytest.raises(
        ValueError, match=r"dim: got 96, expected a power of two .*; use 'haar' or 'block_hadamard'"
    ):
        rotation.create("hadamard", KEY, 96)
    with pytest.raises(ValueError, match="dim: got 81, expected an even one"):
        rotation.create("block_hadamard", KEY, 81)
    with pytest.raises(ValueError, match=r"rotation: got 'qr', expected one of haar, "):
        rotation.create("qr", KEY, 64)
    with pytest.raises(ValueError, match="dim: got 1, expected at least 2"):
        rotation.create("identity", KEY, 1)
