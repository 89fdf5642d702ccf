"""From what every format loses to the allocation that a target asks for, in true bytes."""

from dataclasses import replace
from typing import Literal

from turboquant_jax.cache.allocation import Allocation, Bits, Losses
from turboquant_jax.cache.bytes import (
    compression_ratio,
    exact_bytes_per_token,
    planned_bytes,
)
from turboquant_jax.cache.choice import choose_on_shards
from turboquant_jax.cache.config import CacheConfig
from turboquant_jax.cache.presets import Preset, codecs

PRESET_TOKENS = 65_536
LEAST_RATIO = {"lossless": 3.82, "max": 7.0}
"""Of these presets at that length; the matrices let `lossless` keep 3.5 at 8,192 tokens."""


def fit_ratio(
    config: CacheConfig, losses: Losses, ratio: float, tokens: int, shards: int = 1
) -> Allocation:
    """The allocation of least loss whose cache of `tokens` is `ratio` times smaller than exact.

    Every array of the dense cache of one sequence counts, calibrated matrices too. Of `shards` each
    has as many heads of each format.

    Raises:
      ValueError: a ratio that the smallest formats do not reach.
    """
    costs = _costs(config, losses, tokens)
    most = tokens * exact_bytes_per_token(config) / ratio
    heads = config.num_layers * config.num_kv_heads
    budget = most - _fixed(config, losses, costs, tokens)
    if budget < heads * sum(map(min, costs)):
        raise ValueError(f"ratio: got {ratio}, expected one that the fewest bits reach")
    while True:  # parts have a few bytes of their own
        allocation = choose_on_shards(losses, costs, budget, shards)
        over = planned_bytes(replace(config, allocation=allocation), 1, tokens).total - most
        if over <= 0:
            return allocation
        budget -= over


def fit_preset(config: CacheConfig, losses: Losses, name: Preset, shards: int = 1) -> Allocation:
    """The allocation of least loss in the bytes of a preset at 65,536 tokens, or in `LEAST_RATIO`.

    Of `shards` each has as many heads of each format.

    Raises:
      ValueError: another name.
    """
    key, value = codecs(name)
    uniform = replace(config, key=key, value=value, allocation=None, scale_bits=16)
    ratio = compression_ratio(uniform, PRESET_TOKENS)
    least = max(ratio, LEAST_RATIO.get(name, 0.0))
    return fit_ratio(config, losses, least, PRESET_TOKENS, shards)


def fit_loss(
    config: CacheConfig, losses: Losses, kl: float, tokens: int, shards: int = 1
) -> Allocation:
    """The allocation of the fewest bytes that loses at most `kl` nats a token, as predicted.

    Of `shards` each has as many heads of each format.

    Raises:
      ValueError: a loss below that of the best formats.
    """
    costs = _costs(config, losses, tokens)
    heads = config.num_layers * config.num_kv_heads
    low, high = (float(heads * sum(map(which, costs))) for which in (min, max))

    def choose(budget: float) -> Allocation:
        return choose_on_shards(losses, costs, budget, shards)

    if losses.of(choose(high)) > kl:
        raise ValueError(f"kl: got {kl}, expected one that the most bits reach")
    for _ in range(20):
        middle = (low + high) / 2
        fits = losses.of(choose(middle)) <= kl
        low, high = (low, middle) if fits else (middle, high)
    return choose(high)


def _costs(config: CacheConfig, losses: Losses, tokens: int) -> tuple[list[int], list[int]]:
    """Bytes of the codes of one head, and of its matrices, in every format."""
    return (
        [_bytes(config, "key", bits, tokens) for bits in losses.key_formats],
        [_bytes(config, "value", bits, tokens) for bits in losses.value_formats],
    )


def _bytes(config: CacheConfig, side: Literal["key", "value"], bits: Bits, tokens: int) -> int:
    plain = {name: getattr(config, name).of(1) for name in ("key", "value")}
    one = replace(config, num_layers=1, num_kv_heads=1, allocation=None, **plain)
    without = planned_bytes(one, 1, tokens)
    own = planned_bytes(replace(one, **{side: getattr(config, side).of(bits)}), 1, tokens)
    codes = own.key_codes if side == "key" else own.value_codes
    return codes + max(0, own.codecs - without.codecs)


def _fixed(config: CacheConfig, losses: Losses, costs, tokens: int) -> int:
    """What the formats of the heads do not change."""
    keys, values = (
        menu[cost.index(min(cost))]
        for menu, cost in zip((losses.key_formats, losses.value_formats), costs, strict=True)
    )
    layers = config.num_layers
    least = replace(config, allocation=Allocation((keys,) * layers, (values,) * layers))
    heads = layers * config.num_kv_heads
    return planned_bytes(least, 1, tokens).total - heads * sum(map(min, costs))
