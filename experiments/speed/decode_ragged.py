"""What unlike lengths in a batch cost decode attention.

Kernel, caches and times are those of `decode_speed`. Lengths are drawn uniformly between an eighth
of the capacity and all of it, `seed` by seed, and compared with equal lengths of the same sum: the
same bytes. `splits` are "by length", as the kernel does by itself, or "equal": every sequence has
as many, whatever its length. `ratio_to_equal` is of equal lengths by the same splits.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness.experiment import GPU, Claim, Row, Track, option, where
from experiments.harness.statistics import met
from experiments.speed.common import cache_config, check
from experiments.speed.decode_blocks import Pair
from experiments.speed.decode_schedules import pairs, schedule_of
from experiments.speed.decode_speed import Case, compiled
from experiments.speed.device_time import device_time
from experiments.speed.speed_claims import OURS

NEEDS = GPU
LIMIT = 1.1
SPLITS = ("equal", "by length")


@dataclass(frozen=True)
class Config:
    """What to run."""

    shapes: str = option("8x32768,32x4096", "batch x capacity")
    bits: tuple[int, ...] = option((4, 2), "of keys and values")
    seeds: int = option(2, "draws of the lengths")
    calls: int = option(8, "calls of a chain at least")
    turn: float = option(200.0, "megabytes of caches in turn, more than L2 holds")


SMOKE = Config("2x512", (4,), 1, calls=1, turn=0.1)


@dataclass(frozen=True)
class Ragged(Case):
    """Sequences of these `lengths`, in a cache that holds more."""

    lengths: tuple[int, ...] = ()

    def make(self) -> tuple[jax.Array, list[tuple]]:
        """The first query, and caches that together are more than L2 holds."""
        q, caches = super().make()
        lengths = jnp.asarray(self.lengths, jnp.int32)
        return q, [(blocks, table, lengths) for blocks, table, _ in caches]


def drawn(shape: Pair, seed: int) -> tuple[int, ...]:
    """Lengths of a batch."""
    batch, tokens = shape
    found = np.random.default_rng(seed).integers(tokens // 8, tokens + 1, batch)
    return tuple(found.tolist())


def cases_of(config: Config) -> list[tuple[dict[str, Any], Ragged]]:
    """What names a case, and the case; equal lengths before those that are compared with them."""
    found = []
    for shape in pairs(config.shapes, "x"):
        for bits in config.bits:
            default = schedule_of((bits, bits), shape)
            for seed in range(config.seeds):
                lengths = drawn(shape, seed)
                same = (sum(lengths) // len(lengths),) * len(lengths)
                for splits in SPLITS:
                    schedule = default if splits == SPLITS[1] else replace(default, most=0)
                    for kind, own in (("equal", same), ("drawn", lengths)):
                        names: dict[str, Any] = dict(
                            bits=bits, batch=shape[0], capacity=shape[1], seed=seed
                        )
                        names |= dict(splits=splits, lengths=kind)
                        least = config.calls, config.turn * 1e6
                        case = Ragged(
                            "pallas", (bits, bits), shape, schedule, least=least, lengths=own
                        )
                        found.append((names, case))
    return found


def run(config: Config, track: Track) -> Iterator[Row]:
    """Correctness first; what is measured is compiled ahead, several cases at a time."""
    cases, rows = cases_of(config), list[Row]()
    with ThreadPoolExecutor() as pool:
        chains = pool.map(compiled, [case for _, case in cases])
        for bits in config.bits:
            check(cache_config(1, bits))
        ready = list(chains)
    for (names, case), chain in track(list(zip(cases, ready, strict=True)), "decode_ragged"):
        if isinstance(chain, Exception):
            print(f"{names} failed: {str(chain)[:200]}", flush=True)
            continue
        q, caches = case.make()
        took = device_time(partial(chain, q, caches)).busy
        took = took / case.calls * 1e3
        base = where(rows, **names | dict(lengths="equal"))
        rows.append(
            names
            | {
                "longest_over_mean": max(case.lengths) * len(case.lengths) / sum(case.lengths),
                "milliseconds": took,
                "ratio_to_equal": took / (base[0]["milliseconds"] if base else took),
            }
        )
        yield rows[-1]


def claims(rows: Sequence[Row]) -> list[Claim]:
    """The worst draw of each shape."""
    found = []
    for batch, tokens in dict.fromkeys((row["batch"], row["capacity"]) for row in rows):
        own = where(rows, batch=batch, capacity=tokens, lengths="drawn")
        worst = {
            splits: max((r["ratio_to_equal"] for r in where(own, splits=splits)), default=0.0)
            for splits in SPLITS
        }
        found.append(
            Claim(
                OURS,
                f"{batch} x {tokens:,}: lengths drawn between an eighth and all of it take at most "
                f"{LIMIT} times as long as equal ones",
                f"{worst[SPLITS[1]]:.2f} times at most; {worst[SPLITS[0]]:.2f} with equal splits",
                met(worst[SPLITS[1]] <= LIMIT),
            )
        )
    return found
