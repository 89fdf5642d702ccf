"""What several new tokens of a sequence cost, which attend in one reading of the cache.

Shapes, caches and times are those of `decode_speed`. So many new tokens a sequence (`queries`) of
32 query and 8 kv heads see the compressed cache, and causally themselves, in full precision. cuDNN
attends for as many over the same context in bfloat16. `ratio_to_one` is of the same cache read for
one token; `mean`: "" for none, "stored" or "pre_rope" for that of stored keys or before RoPE.

`shared` are sequences that answer one prompt: the blocks of the prompt are read once for the new
tokens of all of them, and joined with the blocks and the window of each. Their time is that of a
whole call of `attend`, and `ratio_to_one` is of one sequence in such a call; cuDNN reads the prompt
for each.
"""

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

from experiments.harness.experiment import GPU, Claim, Row, Track, option, where
from experiments.harness.journal import open_journal
from experiments.harness.plotting import COLOURS, Figure, label, panels
from experiments.harness.statistics import met
from experiments.speed.common import CHANNELS, HEADS, KV_HEADS, cache_config, check
from experiments.speed.decode_blocks import Pair
from experiments.speed.decode_schedules import GROUP, pairs, sweep_schedules
from experiments.speed.decode_speed import Case, compiled
from experiments.speed.device_time import device_time
from experiments.speed.speed_claims import OURS
from pallas_kernels.decode_attention import Schedule
from pallas_kernels.primitives.limits import MAX_TURNED_HEADS
from turboquant_jax.attention import attend
from turboquant_jax.cache import Cache
from turboquant_jax.models.timing import filled_cache

NEEDS = GPU
SHARED = 1.5
MEANS = {"stored": "the mean of stored keys", "pre_rope": "the mean before RoPE"}
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
    answers: str = option("8x65536", "sequences x tokens of the prompt that they answer")
    sweep: tuple[str, ...] = option((), "schedules instead: programs;pages;warps;stages")
    calls: int = option(8, "calls of a chain at least")
    turn: float = option(200.0, "megabytes of caches in turn, more than L2 holds")
    seconds: float = option(0.0, "start no case after so long, 0 for never")


SMOKE = Config("1x128", (4,), (1, 4), ("",), "2x200", calls=1, turn=0.1)


@dataclass(frozen=True)
class Prompt:
    """A batch of sequences that share a prompt, or one of them, for the calls of its layers."""

    shape: Pair
    mean: str
    bits: Pair = (4, 4)
    name: str = "shared"
    schedule: None = None
    newest: int = 1
    calls: int = 4  # layers, which together are more than L2 holds

    def make(self) -> tuple[jax.Array, list[tuple[Cache]]]:
        """The first query, and the cache: behind the prompt each has a block of its own."""
        (batch, tokens), config = self.shape, cache_config(self.calls, self.bits, self.mean)
        length = tokens + config.sinks + config.window + config.block
        state = filled_cache(config, batch, length, length + 1)
        table = state.table.page_table
        prompt = jnp.arange(table.shape[1]) < config.num_blocks(tokens)
        state = state.with_table(page_table=jnp.where(prompt, table[:1], table))
        q = jax.random.normal(jax.random.key(0), (batch, HEADS, CHANNELS), jnp.bfloat16)
        return q, [(state,)]

    def chain(self, q: jax.Array, caches: list[tuple[Cache]]) -> jax.Array:
        """A call for each layer, the newest token's key and value among the arguments."""
        ((state,),) = caches
        blocks = int(state.config.num_blocks(self.shape[1])) if self.shape[0] > 1 else 0
        new = jnp.zeros((q.shape[0], 1, KV_HEADS, CHANNELS), jnp.bfloat16)
        call = jax.jit(partial(attend, shared_blocks=blocks))
        for layer in range(self.calls):
            q = call(state, jnp.int32(layer), q[:, None], new, new)[:, 0]
        return q


def cases_of(config: Config) -> list[Case]:
    """The baseline of each number of tokens, then the kernel; one token first.

    Of shapes behind the first one the first bits alone, and no mean.
    """
    least = config.calls, config.turn * 1e6
    found = []
    shapes = pairs(config.shapes, "x")
    for shape in shapes:
        for count in sorted(config.queries):
            case = Case("cudnn", (16, 16), shape, queries=GROUP * count, newest=count, least=least)
            found.append(case)
            first = shape == shapes[0]
            for bits in config.bits if first else config.bits[:1]:
                for mean in config.means if bits == 4 and first else config.means[:1]:
                    if mean and case.queries > MAX_TURNED_HEADS:  # two readings
                        continue
                    ours = replace(case, name="pallas-exact", bits=(bits, bits), mean=mean)
                    schedules: list[Schedule | None] = [
                        s for x in config.sweep for s in sweep_schedules(shape, x)
                    ]
                    found += [replace(ours, schedule=s) for s in schedules or [None]]
    return found


def prompts_of(config: Config) -> list[Case | Prompt]:
    """One sequence, then several that share their prompt, each after its baseline."""
    found: list[Case | Prompt] = []
    for batch, tokens in pairs(config.answers, "x"):
        for count in (1, batch):
            found.append(Case("cudnn", (16, 16), (count, tokens), least=(config.calls, 1.0)))
            found += [Prompt((count, tokens), mean or "stored") for mean in config.means]
    return found


def run(config: Config, track: Track) -> Iterator[Row]:
    """Correctness first, of the most tokens; several cases are compiled at a time."""
    choosing = "shapes", "bits", "queries", "means", "sweep", "answers"
    journal = open_journal("decode_tokens", config, choosing)
    every = [*cases_of(config), *([] if config.sweep else prompts_of(config))]
    cases = {str(case): case for case in every}
    checks = [
        partial(check, cache_config(1, bits, mean), tokens=max(config.queries))
        for bits in config.bits
        for mean in (config.means if bits == 4 else config.means[:1])
    ]
    rows: list[Row] = []
    with ThreadPoolExecutor(_COMPILERS) as pool:
        right = [pool.submit(run) for run in checks]
        waiting = [name for name in cases if name not in journal.held]
        chains = {name: pool.submit(compiled, cases[name]) for name in waiting}
        for made in right:
            made.result()
        for name in track(list(cases), "decode_tokens"):
            measure = functools.partial(_measure, cases[name], chains.get(name), rows)
            fresh = journal.measure(name, measure)
            rows += fresh
            yield from fresh


def _measure(case: Case | Prompt, made: Future | None, rows: Sequence[Row]) -> list[Row]:
    """The row of a case; none where it does not compile."""
    assert made is not None, "a case that the journal does not hold"
    if isinstance(chain := made.result(), Exception):
        print(f"{case} failed: {str(chain)[:200]}", flush=True)
        return []
    s, (q, caches) = case.schedule, case.make()
    took = device_time(lambda: chain(q, caches)).busy / case.calls * 1e3
    same = dict(batch=case.shape[0], tokens=case.shape[1])
    own = dict(implementation=case.name, bits_k=case.bits[0], bits_v=case.bits[1], mean=case.mean)
    alone = same | (dict(batch=1) if isinstance(case, Prompt) else {})
    one = where(rows, queries=1, **alone, **own)
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
        for row in where(full, queries=count)
        if not row.get("mean")  # a file has no empty values
    ] + [
        Claim(
            OURS,
            f"{row['batch']} answers to one prompt of {row['tokens']:,} tokens, "
            f"{MEANS[row['mean']]}: at most {SHARED} times the time of one",
            f"{row['ratio_to_one']:.2f} times: {row['milliseconds'] * 1e3:.1f} us",
            met(row["ratio_to_one"] <= SHARED),
        )
        for row in where(rows, implementation="shared")
        if row["batch"] > 1
    ]


def figure(rows: Sequence[Row]) -> Figure | None:
    """Time of several tokens over that of one, of each shape."""
    ours = [r for r in where(rows, implementation="pallas-exact") if not r.get("schedule")]
    shapes = list(dict.fromkeys((row["batch"], row["tokens"]) for row in ours))
    if not shapes:
        return None
    made, axes = panels(1, len(shapes), 4.4, 3.4)
    for axis, (batch, tokens) in zip(axes[0], shapes, strict=True):
        of_shape = where(ours, batch=batch, tokens=tokens)
        settings = dict.fromkeys((row["bits_k"], row.get("mean")) for row in of_shape)
        for colour, (bits, mean) in zip(COLOURS, settings, strict=False):
            line = [x for x in where(of_shape, bits_k=bits) if x.get("mean") == mean]
            name = f"{bits} bits" + (", mean before RoPE" if mean else "")
            places = [row["queries"] for row in line], [row["ratio_to_one"] for row in line]
            axis.plot(*places, "o-", color=colour, label=name)
        label(axis, f"{batch} x {tokens:,}", "new tokens of a sequence", "times one token's time")
    return made
