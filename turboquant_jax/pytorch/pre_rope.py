"""The mean key before RoPE, at any place, in torch: the arithmetic of `cache.pre_rope`.

Every product here is exact in float32 and every sum of two is rounded once, so that all devices get
the same bits; the mean itself is summed by halves.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pallas_kernels.primitives.period import PERIOD
from turboquant_jax.cache.angles import FINE, WITHIN_BITS, angle_tables
from turboquant_jax.cache.config import CacheConfig
from turboquant_jax.pytorch.sums import ordered_sum


@dataclass(frozen=True, eq=False)
class Phases:
    """The tables of `cache.pre_rope.Phases` as tensors."""

    coarse: Tensor
    fine: Tensor
    within: Tensor
    rotary: int

    def at(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [*index, H] of the tables for tokens counted behind the sinks, coarse first."""
        period, place = index // PERIOD, index % PERIOD
        coarse = (period // FINE).clamp(0, self.coarse.shape[0] - 1)
        return (
            self.coarse[coarse.long()],
            self.fine[(period % FINE).long()],
            self.within[place.long()],
        )


def create(config: CacheConfig, capacity: int, device: torch.device) -> Phases | None:
    """Tables for sequences of up to `capacity` tokens; None where there is no use for them."""
    if not config.center_keys or config.rope_frequencies is None:
        return None
    coarse, fine, within = (
        torch.tensor(table, device=device) for table in angle_tables(config, capacity)
    )
    return Phases(coarse, fine, within, 2 * len(config.rope_frequencies))


def mean_key(keys: Tensor, phases: Phases | None) -> Tensor:
    """The mean [*batch, K, H] of a sequence's first block [*batch, T, K, H], float32.

    Of those keys that are finite, before RoPE where there are phases; 0 if none is finite.
    """
    keys = keys.to(torch.float32)
    finite = torch.isfinite(keys).all(dim=-1, keepdim=True)
    count = finite.sum(dim=-3).to(torch.float32)
    if phases is not None:
        index = torch.arange(keys.shape[-3], device=keys.device)
        for angles in reversed(phases.at(index)):
            keys = turn(keys, angles[:, None], phases.rotary, back=True)
    total = ordered_sum(torch.where(finite, keys, 0.0).movedim(-3, -1))
    return total / count.clamp(min=1.0)


def mean_at(mean: Tensor, phases: Phases | None, index: Tensor) -> Tensor:
    """R_p m [*batch, T, K, H] of mean keys [*batch, K, H] at tokens `index` [*batch, T]."""
    if phases is None:
        return mean[..., None, :, :].expand(*index.shape, *mean.shape[-2:])
    within = phases.at(index)[2]
    return turn(mean_of_period(mean, phases, index // PERIOD), within[..., None, :], phases.rotary)


def mean_of_period(mean: Tensor, phases: Phases, period: Tensor) -> Tensor:
    """E_J m [*batch, T, K, H], from which tokens of period J turn the mean by their place in it."""
    coarse, fine, _ = phases.at(period * PERIOD)
    turned = mean[..., None, :, :].expand(*period.shape, *mean.shape[-2:])
    for angles in (coarse, fine):
        turned = turn(turned, angles[..., None, :], phases.rotary)
    bits = turned.view(torch.int32) + (1 << (WITHIN_BITS - 1))
    return (bits & -(1 << WITHIN_BITS)).view(torch.float32)


def center(keys: Tensor, mean: Tensor, phases: Phases | None, index: Tensor) -> Tensor:
    """Keys [*batch, T, K, H] less their mean, as they are quantized, float32."""
    if phases is None:
        return keys.to(torch.float32) - mean[..., None, :, :]
    turned = mean_of_period(mean, phases, index // PERIOD)
    cos, sin = phases.at(index)[2].to(torch.float32)[..., None, :].chunk(2, dim=-1)
    a, b = split_pairs(turned, phases.rotary)
    first, second = split_pairs(keys.to(torch.float32), phases.rotary)
    centred = join_pairs(first - a * cos + b * sin, second - b * cos - a * sin, phases.rotary)
    if keys.dtype == torch.bfloat16:
        return centred.to(torch.bfloat16).to(torch.float32)
    return centred


def turn(x: Tensor, angles: Tensor, rotary: int, *, back: bool = False) -> Tensor:
    """Turn the pairs of float32 vectors by rows of a table, or back by them."""
    cos, sin = angles.to(torch.float32).chunk(2, dim=-1)
    sin = -sin if back else sin
    (a, a_rest), (b, b_rest) = (_halves(part) for part in split_pairs(x, rotary))
    first = (a * cos - b * sin) + (a_rest * cos - b_rest * sin)
    second = (b * cos + a * sin) + (b_rest * cos + a_rest * sin)
    return join_pairs(first, second, rotary)


def split_pairs(x: Tensor, rotary: int) -> tuple[Tensor, Tensor]:
    """First and second channels of all pairs."""
    rest = (x.shape[-1] - rotary) // 2
    a, b, c, d = x.split((rotary // 2, rotary // 2, rest, rest), dim=-1)
    return torch.cat([a, c], dim=-1), torch.cat([b, d], dim=-1)


def join_pairs(first: Tensor, second: Tensor, rotary: int) -> Tensor:
    """The channels of `split_pairs` in their order."""
    sizes = (rotary // 2, first.shape[-1] - rotary // 2)
    (a, c), (b, d) = (x.split(sizes, dim=-1) for x in (first, second))
    return torch.cat([a, b, c, d], dim=-1)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """The first 12 significant bits of float32 numbers, and the other 12."""
    upper = (x.contiguous().view(torch.int32) & -(1 << 12)).view(torch.float32)
    return upper, x - upper
