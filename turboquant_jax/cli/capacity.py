"""How many tokens of a compressed cache fit a memory, on one device or on each of a mesh."""

from jax.sharding import AbstractMesh

from turboquant_jax.cache import CacheConfig, sharding
from turboquant_jax.cache.bytes import bytes_per_compressed_token, planned_bytes
from turboquant_jax.cache.layout import STRIPE
from turboquant_jax.cache.mesh import CONTEXT, DATA, local_config

MOST_TOKENS = 2**30  # positions are int32


def tokens_that_fit(
    config: CacheConfig, batch: int, budget: int, mesh: AbstractMesh | None = None
) -> int:
    """Most tokens a sequence for which a dense cache takes at most `budget` bytes, exactly."""
    low, high = 0, MOST_TOKENS
    per_token = bytes_of_token(config, mesh)
    if per_token:  # no token is cheaper than a compressed one; a block or stripe may not be full
        rows, shares = (1, 1) if mesh is None else (mesh.shape[DATA], mesh.shape[CONTEXT])
        high = min(high, int(budget * rows / (batch * per_token)) + shares * STRIPE + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (
            (middle, high) if cache_bytes(config, batch, middle, mesh) <= budget else (low, middle)
        )
    return low


def cache_bytes(config: CacheConfig, batch: int, tokens: int, mesh: AbstractMesh | None) -> int:
    """Of a cache, on a mesh on each device."""
    if mesh is None:
        return planned_bytes(config, batch, tokens).total
    return sharding.planned_bytes(mesh, config, batch, tokens).total


def bytes_of_token(config: CacheConfig, mesh: AbstractMesh | None) -> float:
    """Bytes of a further token of a sequence, on a mesh on each device that has the sequence."""
    if mesh is None:
        return bytes_per_compressed_token(config)
    return bytes_per_compressed_token(local_config(config, mesh)) / mesh.shape[CONTEXT]
