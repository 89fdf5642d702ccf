"""A step of decoding under PyTorch and transformers, cache by cache.

Random weights of Llama-3-8B in bfloat16, made on the device, through transformers'
`LlamaForCausalLM`; one new token a sequence, the most likely one, in every step. Caches are filled
with random tokens, ours with random codes, at full length: a step takes the same time whatever they
say. `dynamic` and `static` are transformers' own caches with its implementation "sdpa",
`dynamic flash` the first with flash attention, `quantized` transformers' QuantizedCache, by hqq,
which has no wheel, or by optimum-quanto, which builds CUDA code when it is first used; ours are
`4 bits` (scalar codes for keys and values) and the preset `balanced` (a trellis of 3 bits).
`captured` steps are replayed from a CUDA graph; `fused` ones too, with norms, RoPE, residuals and
activations as one kernel each. `our own decoder` is that of `llama_speed` at 4 bits, in JAX, in a
process of its own before all others.

A time is that of consecutive steps by CUDA events, over their number, the median over loops. Loops
of ours are whole blocks long, so that they compress what they complete: `milliseconds_longest` is
the step that does, `milliseconds_median` one that does not. `cache_bytes` counts all
tensors of the cache, `peak_bytes` all memory that torch held meanwhile. `ratio_to_dynamic`: the
time of `dynamic` over this one. What could not be measured has a `note` that says why. Needs the
extra `torch`; the GPU must be left to torch: `JAX_PLATFORMS=cpu`.
"""

import functools
import gc
import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from experiments.harness import results
from experiments.harness.data import require_torch
from experiments.harness.experiment import AIM, QUESTION, Claim, Row, Track, option, where
from experiments.harness.journal import Journal, open_journal
from experiments.harness.statistics import met
from turboquant_jax.models import PRESETS

NEEDS = "the extra torch, and an NVIDIA GPU of 80 GB for its full size"
KEYS = ("cache", "captured", "fused", "batch", "context")
OWN = "our own decoder"
CACHES = (
    *("dynamic", OWN, "static, captured", "4 bits, fused", "4 bits, captured", "balanced, fused"),
    *("balanced, captured", "4 bits", "dynamic flash", "quantized"),
)
_SHARED = (
    *("batch", "context", "milliseconds_per_step", "milliseconds_min", "milliseconds_max"),
    *("cache_bytes", "peak_bytes"),
)
OWN_SHARE = 0.6
"""Of the time, if there is a limit, the share that our own decoder has."""
WITHIN = 1.1
"""The aim: a captured step in at most this many times that of our own decoder."""


@dataclass(frozen=True)
class Config:
    """What to run."""

    cases: tuple[str, ...] = option(
        ("32x4096", "8x32768", "1x4096", "8x4096", "1x32768", "32x32768"), "batch x context"
    )
    caches: tuple[str, ...] = option(CACHES, "caches, the first one the baseline")
    model: str = option("llama-3-8b", "preset whose sizes the random weights have")
    layers: int = option(0, "layers instead of the preset's, if not 0")
    steps: int = option(64, "steps of a loop, a whole number of blocks")
    baseline_steps: int = option(16, "steps of a loop of transformers' caches")
    repeats: int = option(3, "timed loops")
    seconds: float = option(0.0, "start nothing after so long, 0 for never")


SMOKE = Config(
    ("2x200",),
    ("dynamic", OWN, "static, captured", "4 bits, fused", "4 bits"),
    "smollm2-135m",
    1,
    2,
    2,
    1,
)


def device() -> str:
    """What the rows were measured on."""
    require_torch()
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def run(config: Config, track: Track) -> Iterator[Row]:
    """Measure every cache of every case, what a journal holds only once."""
    require_torch()
    if jax.default_backend() == "gpu":
        raise ValueError("jax: got the GPU, expected JAX_PLATFORMS=cpu: its memory is torch's")
    bench = functools.cache(functools.partial(_bench, config))
    journal = open_journal("pytorch_speed", config, ("cases", "caches"))
    if OWN in config.caches:
        _measure_own(config, journal)
    for case in track(config.cases, "pytorch_speed"):
        batch, context = map(int, case.split("x"))
        base: list[Row] = []
        for cache in config.caches:

            def make(cache=cache, batch=batch, context=context) -> list[Row]:
                return [_row(config, bench(), cache, batch, context)]

            name = f"{case} {cache}"
            # who compiles on the GPU has been there before
            rows = journal.held.get(name, []) if cache == OWN else journal.measure(name, make)
            if cache == config.caches[0]:
                base = [row for row in rows if "milliseconds_per_step" in row]
            for row in rows:
                if base and "milliseconds_per_step" in row:
                    own, first = (x["milliseconds_per_step"] for x in (row, base[0]))
                    row["ratio_to_dynamic"] = first / own
            yield from rows


def _measure_own(config: Config, journal: Journal) -> None:
    """The rows of our own decoder into the journal, as they come, while the GPU is empty."""
    name = f"{{}} {OWN}".format
    cases = [case for case in config.cases if name(case) not in journal.held]
    if not cases or not journal.has_time():
        return
    numbers = map(str, (config.layers, config.steps, config.repeats))
    module = "experiments.speed.decoder_in_jax"
    program = [sys.executable, "-m", module, config.model, *numbers, *cases]
    changes = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".95"}
    changes["JAX_PLATFORMS"] = "cpu" if device() == "cpu" else "cuda,cpu"
    limit = (config.seconds or float("inf")) * OWN_SHARE
    with subprocess.Popen(
        program, env=os.environ | changes, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        ending = threading.Timer(min(limit, threading.TIMEOUT_MAX), process.kill)
        ending.daemon = True
        ending.start()
        for line in filter(lambda x: x.startswith("{"), process.stdout):
            found = json.loads(line)
            row = {"cache": OWN, "captured": 1, "fused": 0, **{k: found[k] for k in _SHARED}}
            journal.measure(name(found["case"]), functools.partial(list, [row]))
        ending.cancel()
    if process.returncode:
        print("our own decoder failed; its words are above", file=sys.stderr)


def _bench(config: Config) -> Any:
    import torch

    from experiments.harness import torch_models

    preset = PRESETS[config.model]
    sizes = replace(preset, num_layers=config.layers or preset.num_layers)
    return torch_models.random_model(sizes, torch.bfloat16, torch_models.device())


def _row(config: Config, model: Any, cache: str, batch: int, context: int) -> Row:
    """A measurement, or what stood in its way; the next ones may go well."""
    import torch

    from experiments.speed import pytorch_steps

    name, _, how = cache.partition(", ")
    head: Row = {"cache": name, "captured": int(bool(how)), "fused": int(how == "fused")}
    head |= {"batch": batch, "context": context}
    if (missing := pytorch_steps.missing(name)) is not None:
        return head | {"note": missing}
    loop = config.steps if name in pytorch_steps.OURS else config.baseline_steps
    try:
        with torch.no_grad():
            make: Callable[..., Any] = pytorch_steps.MAKERS[name]
            made = make(model, name, (batch, context, loop + 1), how)
            row = head | pytorch_steps.time_steps(made, batch, loop, config.repeats)
            del made
    except torch.OutOfMemoryError as error:
        row = head | {"note": "out of memory: " + str(error).partition(". ")[2].partition(". ")[0]}
    except Exception as error:
        traceback.print_exc()
        row = head | {"note": f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"}
    gc.collect()
    pytorch_steps.release()
    return row


def claims(rows: Sequence[Row]) -> list[Claim]:
    """Against our own decoder where its rows are committed, and against transformers' caches."""
    timed = [row for row in rows if "milliseconds_per_step" in row]
    made = []
    for row in timed:
        case = {name: row[name] for name in ("batch", "context")}
        name = f"{row['batch']} x {row['context']}, {row['cache']}"
        name += ", fused" * row.get("fused", 0)
        if not row["captured"] or row["cache"] in ("static", "dynamic", OWN):
            continue
        own = row["milliseconds_per_step"]
        for jax_row in _decoder_rows(rows, row):
            theirs = jax_row["milliseconds_per_step"]
            made.append(
                Claim(
                    AIM,
                    f"{name}: a captured step within {WITHIN - 1:.0%} of our own decoder's",
                    f"{own:.2f} ms against {theirs:.2f} ms, {own / theirs:.2f} times",
                    met(own <= WITHIN * theirs),
                    topic="under PyTorch, a captured step within 10 % of our own decoder's",
                    short=f"{name}: {own / theirs:.2f} times",
                )
            )
        others = [r for r in where(timed, **case) if r["cache"] in ("static", "dynamic")]
        if others:
            best = min(others, key=lambda r: r["milliseconds_per_step"])
            theirs, size = best["milliseconds_per_step"], best["cache_bytes"] / row["cache_bytes"]
            made.append(
                Claim(
                    QUESTION,
                    f"{name}: a captured step faster than the fastest of transformers' own",
                    f"{own:.2f} ms against {theirs:.2f} ms ({best['cache']}), "
                    f"in {1 / size:.2f} times its bytes",
                    "holds" if own < theirs else "does not hold",
                )
            )
    return made


def _decoder_rows(rows: Sequence[Row], row: Row) -> list[Row]:
    """Our own decoder's in the case of a row: of the same run, or else of `llama_speed.stored`.

    Those are of the mean of stored keys, the faster one: `llama_speed` has not all cases yet.
    """
    case = {name: row[name] for name in ("batch", "context")}
    if row["cache"] == "4 bits" and (same := where(rows, cache=OWN, **case)):
        return same
    found = results.find(results.COMMITTED, "llama_speed.stored")
    held = [
        row for one in found for row in one.rows if row.get("model", "llama-3-8b") == "llama-3-8b"
    ]
    return where(held, cache=row["cache"], **case)
