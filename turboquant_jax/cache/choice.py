"""Which format every head gets: the choice that loses least for what it costs."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pallas_kernels.primitives.limits import MAX_FORMATS
from turboquant_jax.cache.allocation import Allocation, Losses, nested

MAX_KINDS = 6
"""Formats of a cache: each is compiled apart, wherever its heads are."""


def choose(
    losses: Losses,
    costs: tuple[Sequence[float], Sequence[float]],
    budget: float,
    most: int = MAX_FORMATS,
    kinds: int = MAX_KINDS,
) -> Allocation:
    """The formats of every head that lose least for what they cost, at most `budget` in all.

    With a price per cost, every head takes what is cheapest, price and loss added: no choice of the
    same cost loses less. The lowest price that the budget allows is found by halving; what it
    leaves of the budget goes to heads one by one, the most useful first. Where that takes more than
    `kinds` formats, it is done with the few that serve all heads best at a price, for prices around
    that one, and the least loss counts.

    Args:
      losses: of all formats.
      costs: of the formats of keys and of values, for one head: bytes, for example.
      budget: of all heads.
      most: different (keys, values) formats in a layer.
      kinds: of them in the whole cache.

    Raises:
      ValueError: a budget below the cheapest choice.
    """
    loss = np.asarray(losses.keys)[..., :, None] + np.asarray(losses.values)[..., None, :]
    cost = np.add.outer(*(np.asarray(side, float) for side in costs)).ravel()
    loss = loss.reshape(*loss.shape[:2], -1)  # of every head by (format of keys, of values)
    heads = loss.shape[0] * loss.shape[1]
    if budget < heads * cost.min():
        raise ValueError(f"budget: got {budget:,.0f}, expected at least {heads * cost.min():,.0f}")
    chosen, price = _least(loss, cost, budget, most)
    if len(np.unique(chosen)) > kinds:
        prices = price * 2.0 ** np.linspace(-2, 2, 9)
        few = {tuple(_keep((loss + p * cost).reshape(heads, -1), kinds)) for p in prices}
        cheapest = np.argmin(cost)  # alone it is always within the budget
        tried = [
            kept[_least(loss[..., kept], cost[kept], budget, most)[0]]
            for kept in map(np.asarray, sorted({*few, (cheapest,)}))
            if budget >= heads * cost[kept].min()
        ]
        chosen = min(tried, key=lambda some: _taken(loss, some).sum())
    pairs = [
        [(losses.key_formats[i], losses.value_formats[j]) for i, j in zip(*where, strict=True)]
        for where in (np.unravel_index(row, tuple(map(len, costs))) for row in chosen)
    ]
    keys, values = (tuple(tuple(p[side] for p in row) for row in pairs) for side in (0, 1))
    return Allocation(keys, values)


def choose_on_shards(
    losses: Losses, costs: tuple[Sequence[float], Sequence[float]], budget: float, shards: int
) -> Allocation:
    """`choose`, so that every shard of the heads, in their order, has as many of each format.

    In a layer the heads that lose most on their shards have one format, then the second, and so on.

    Raises:
      ValueError: shards that do not divide the heads.
    """
    if shards == 1:
        return choose(losses, costs, budget)
    keys, values = (np.asarray(side) for side in (losses.keys, losses.values))
    layers, heads = keys.shape[:2]
    if heads % shards:
        raise ValueError(f"shards: got {shards} of {heads} kv heads, expected a divisor of them")
    lost = keys.mean(axis=-1) + values.mean(axis=-1)
    rank = np.argsort(-lost.reshape(layers, shards, -1), axis=-1, kind="stable")
    own = rank + np.arange(0, heads, heads // shards)[None, :, None]  # [layers, shards, rank]
    keys, values = (side[np.arange(layers)[:, None, None], own].sum(1) for side in (keys, values))
    together = replace(losses, keys=nested(keys), values=nested(values))
    of_all = tuple([shards * cost for cost in side] for side in costs)
    chosen = choose(together, (of_all[0], of_all[1]), budget)
    place = np.empty((layers, heads), int)  # of every head, its rank
    np.put_along_axis(
        place, own.reshape(layers, heads), np.tile(np.arange(heads // shards), shards)[None], 1
    )
    found = [
        tuple(
            tuple(pairs[rank % len(pairs)][side] for rank in row)
            for pairs, row in zip(chosen.layers, place, strict=True)
        )
        for side in (0, 1)
    ]
    return Allocation(found[0], found[1])


def _taken(loss: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Of every head what its column has."""
    return np.take_along_axis(loss, chosen[..., None], axis=2)[..., 0]


def _least(
    loss: np.ndarray, cost: np.ndarray, budget: float, most: int
) -> tuple[np.ndarray, float]:
    """The column of every head, and the price; the cheapest columns are within the budget."""

    def at(price: float) -> np.ndarray:
        # a format must not win by a tie in its loss alone: the cheaper of two has it
        priced = loss + price * cost
        if loss.shape[1] <= most:
            return np.argmin(priced, axis=2)
        found = []
        for of_layer in priced:
            kept = _keep(of_layer, most)
            found.append(kept[np.argmin(of_layer[:, kept], axis=1)])
        return np.stack(found)

    low, high = 0.0, 1e-30
    chosen = at(low)
    if cost[chosen].sum() > budget:
        while cost[chosen := at(high)].sum() > budget:
            low, high = high, 4 * high
        for _ in range(40):
            middle = (low + high) / 2
            if cost[found := at(middle)].sum() > budget:
                low = middle
            else:
                high, chosen = middle, found
    return _spend(loss, cost, chosen, budget - cost[chosen].sum(), most), high


def _keep(of_heads: np.ndarray, most: int) -> np.ndarray:
    """At most so many columns, of which each head takes its least number: these add up to little.

    The column that helps most, again and again; then each is exchanged while that is better.
    """
    wanted = np.unique(np.argmin(of_heads, axis=1))
    if len(wanted) <= most:
        return wanted
    kept: list[int] = []
    while True:
        before = kept.copy()
        for place in range(most):
            others = of_heads[:, kept[:place] + kept[place + 1 :]]
            rest = np.min(others, axis=1, keepdims=True, initial=np.inf)
            kept[place : place + 1] = [int(np.argmin(np.minimum(of_heads, rest).sum(axis=0)))]
        if kept == before:
            return np.unique(kept)


def _spend(
    loss: np.ndarray, cost: np.ndarray, chosen: np.ndarray, rest: float, most: int
) -> np.ndarray:
    """Give single heads dearer formats while the rest of the budget lasts."""
    chosen = chosen.copy()
    while True:
        gain = _taken(loss, chosen)[..., None] - loss
        more = cost - cost[chosen][..., None]
        for layer, heads in enumerate(chosen):
            if len(used := set(heads.tolist())) == most:
                gain[layer][:, [c for c in range(len(cost)) if c not in used]] = 0
        worth = np.where((gain > 0) & (more <= rest), gain / np.maximum(more, 1e-300), 0)
        where = np.unravel_index(np.argmax(worth), worth.shape)
        if worth[where] <= 0:
            return chosen
        rest -= float(more[where])
        chosen[where[0], where[1]] = where[2]
