"""The families of vectors that quantizers are tried on, synthetic and real."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.harness import data

SYNTHETIC = ("sphere", "offset", "one_hot", "two_hot")
REAL_DIMS = {"keys": 64, "values": 64, "sentences": 256}
FAMILIES = (*SYNTHETIC, *REAL_DIMS)
OFFSETS = {"sphere": 0.0, "offset_1": 1.0, "offset": 3.0}  # mean of N(., 1) coordinates

_TOKENS = 1024  # of text, for keys and values: 92,160 vectors of each
_SENTENCES = 101_000


def draw(family: str, key: Array, count: int, dim: int) -> Float[Array, "count dim"]:
    """Draw unit vectors of a family.

    Args:
      family: "sphere" (uniform), "offset" and "offset_1" (N(3, 1) and N(1, 1) coordinates),
        "constant" (all coordinates equal), "one_hot" and "two_hot" (one or two entries of equal
        size and random sign), "keys" and "values" of SmolLM2 on a novel, or "sentences".
      key: random key.
      count: how many vectors.
      dim: their dimension; real families have only their own.

    Raises:
      ValueError: an unknown family, or a dim that it does not have.
      MissingDataError: the package of a real family is not installed.
    """
    if family in REAL_DIMS:
        if dim != REAL_DIMS[family]:
            raise ValueError(f"{family} have dim {REAL_DIMS[family]}, got {dim}")
        pool = _pool(family)
        rows = np.asarray(jax.random.choice(key, len(pool), (count,), replace=False))
        x = jnp.asarray(pool[rows])
    elif family in OFFSETS:
        x = jax.random.normal(key, (count, dim)) + OFFSETS[family]
    elif family == "constant":
        x = jnp.ones((count, dim))
    elif family in ("one_hot", "two_hot"):
        x = _sparse(key, count, dim, 1 if family == "one_hot" else 2)
    else:
        raise ValueError(f"no family of vectors is called {family!r}")
    return x / jnp.linalg.norm(x, axis=1, keepdims=True)


def _sparse(key: Array, count: int, dim: int, entries: int) -> Float[Array, "count dim"]:
    place, sign = jax.random.split(key)
    order = jnp.argsort(jax.random.uniform(place, (count, dim)), axis=1)
    signs = jax.random.rademacher(sign, (count, dim), jnp.float32)
    return jnp.where(order < entries, signs, 0.0)


def _pool(family: str) -> Float[np.ndarray, "rows d"]:
    if family == "sentences":
        return data.sentence_embeddings(_SENTENCES)
    heads = data.smollm2_heads(_TOKENS)
    vectors = heads.k if family == "keys" else heads.v
    return vectors.reshape(-1, vectors.shape[-1])


def dims_of(family: str, dims: tuple[int, ...]) -> tuple[int, ...]:
    """The dimensions to try: `dims` for a synthetic family, its own for a real one."""
    return (REAL_DIMS[family],) if family in REAL_DIMS else dims
