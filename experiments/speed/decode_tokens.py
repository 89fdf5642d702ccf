"""What several new tokens of a sequence cost, which attend in one reading of the cache.

Shapes, caches and times are those of `decode_speed`. So many new tokens a sequence (`queries`) of
32 query and 8 kv heads see the compressed cache, and causally themselves, in full precision. cuDNN
attends for as many over the same context in bfloat16. `ratio_to_one` is of the same cache read for
one token; `mean`: "" for none, or "pre_rope" for the mean before RoPE added back to the scores.
"""

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

from experiments.harness.experiment import GPU, Claim, Row, Track, option, where
from experiments.harness.journal import open_journal
from experiments.harness.plotting import COLOURS, Figure, label, panels
from experiments.harness.statistics import met
from experiments.speed.common import cache_config, check
from experiments.speed.decode_schedules import GROUP, pairs, sweep_schedules
from experiments.speed.decode_speed import Case, compiled
from experiments.speed.device_time import device_time
from experiments.speed.speed_claims import OURS
from pallas_kernels.decode_attention import Schedule
from pallas_kernels.primitives.limits import MAX_TURNED_HEADS

NEEDS = GPU
LIMITS = {"at most": {4: 1.25, 8: 1.6}, "hoped for: at most": {4: 1.15, 8: 1.4}}
FULL = (8, 32768)
_COMPILERS = 12


@dataclass(frozen=True)
class Config:
    """What to run."""

    shapes: str = option("8x32768,1x8192", "batch x tokens")
    bits: tuple[int, ...] = option((4, 3, 2), "of keys and values")
    queries: tuple[int, ...] = option((1, 2, 4, 8), "new tokens of a sequence")
    means: tuple[str, ...] = option(("", "pre_rope"), "of the keys; a mean at 4 bits only")
    sweep: tuple[str, ...] = option((), "schedules instead: programs;pages;warps;stages")
    calls: int = option(8, "calls of a chain at least")
    turn: float = option(200.0, "megabytes of caches in turn, more than L2 holds")
    seconds: float = option(0.0, "start no case after so long, 0 for never")


SMOKE = Config("1x128", (4,), (1, 4), ("",), calls=1, turn=0.1)


def cases_of(config: Config) -> list[Case]:
    """The baseline of each number of tokens, then the kernel; one token first."""
    least = config.calls, config.turn * 1e6
    found = []
    for shape in pairs(config.shapes, "x"):
        for count in sorted(config.queries):
            case = Case("cudnn", (16, 16), shape, queries=GROUP * count, newest=count, least=least)
            found.append(case)
            for bits in config.bits:
                for mean in config.means if bits == 4 else config.means[:1]:
                    if mean and case.queries > MAX_TURNED_HEADS:  # two readings
                        continue
                    ours = replace(case, name="pallas-exact", bits=(bits, bits), mean=mean)
                    schedules: list[Schedule | None] = [
                        s for x in config.sweep for s in sweep_schedules(shape, x)
                    ]
                    found += [replace(ours, schedule=s) for s in schedules or [None]]
    return found


def run(config: Config, track: Track) -> Iterator[Row]:
    """Correctness first; what is measured is compiled ahead, several cases at a time."""
    journal = open_journal("decode_tokens", config, ("shapes", "bits", "queries", "means", "sweep"))
    cases = {str(case): case for case in cases_of(config)}
    checks = [
        partial(check, cache_config(1, bits, mean), tokens=count)
        for bits in config.bits
        for mean in (config.means if bits == 4 else config.means[:1])
        for count in config.queries
        if count > 1
    ]
    rows: list[Row] = []
    with ThreadPoolExecutor(_COMPILERS) as pool:
        waiting = [case for name, case in cases.items() if name not in journal.held]
        chains = dict(zip(map(str, waiting), pool.map(compiled, waiting), strict=True))
        list(pool.map(lambda run: run(), checks))
    for name in track(list(cases), "decode_tokens"):
        measure = functools.partial(_measure, cases[name], chains.get(name), rows)
        fresh = journal.measure(name, measure)
        rows += fresh
        yield from fresh


def _measure(case: Case, chain, rows: Sequence[Row]) -> list[Row]:
    """The row of a case; none where it does not compile."""
    if isinstance(chain, Exception):
        print(f"{case} failed: {str(chain)[:200]}", flush=True)
        return []
    s, (q, caches) = case.schedule, case.make()
    took = device_time(lambda: chain(q, caches)).busy / case.calls * 1e3
    same = dict(batch=case.shape[0], tokens=case.shape[1])
    own = dict(implementation=case.name, bits_k=case.bits[0], bits_v=case.bits[1], mean=case.mean)
    one = where(rows, queries=1, **same, **own)
    base = where(rows, queries=case.newest, implementation="cudnn", **same)
    first = one[0]["milliseconds"] if one else (took if case.newest == 1 else float("nan"))
    full = base[0]["milliseconds"] if base else (took if not s else float("nan"))
    return [
        {"queries": case.newest}
        | own
        | same
        | {
            "schedule": f"s{s.splits} p{s.pages} w{s.warps} st{s.stages}" if s else "",
            "milliseconds": took,
            "ratio_to_one": took / first,
            "speedup_over_cudnn": full / took,
        }
    ]


def claims(rows: Sequence[Row]) -> list[Claim]:
    """What more tokens cost; the aims are of 4 bits without a mean at 8 x 32,768."""
    full = where(rows, implementation="pallas-exact", batch=FULL[0], tokens=FULL[1], bits_k=4)
    return [
        Claim(
            OURS,
            f"8 x 32,768, 4 bits: {count} new tokens take {words} {limit} times the time of one",
            f"{row['ratio_to_one']:.3f} times: {row['milliseconds'] * 1e3:.1f} us",
            met(row["ratio_to_one"] <= limit),
        )
        for words, limits in LIMITS.items()
        for count, limit in limits.items()
        for row in where(full, queries=count, mean="")
    ]


def figure(rows: Sequence[Row]) -> Figure | None:
    """Time of several tokens over that of one, of each shape."""
    ours = [r for r in where(rows, implementation="pallas-exact") if not r["schedule"]]
    shapes = list(dict.fromkeys((row["batch"], row["tokens"]) for row in ours))
    if not shapes:
        return None
    made, axes = panels(1, len(shapes), 4.4, 3.4)
    for axis, (batch, tokens) in zip(axes[0], shapes, strict=True):
        of_shape = where(ours, batch=batch, tokens=tokens)
        settings = dict.fromkeys((row["bits_k"], row["mean"]) for row in of_shape)
        for colour, (bits, mean) in zip(COLOURS, settings, strict=False):
            line = where(of_shape, bits_k=bits, mean=mean)
            name = f"{bits} bits" + (", mean before RoPE" if mean else "")
            places = [row["queries"] for row in line], [row["ratio_to_one"] for row in line]
            axis.plot(*places, "o-", color=colour, label=name)
        label(axis, f"{batch} x {tokens:,}", "new tokens of a sequence", "times one token's time")
    return made
