"""Decoding in vLLM: our backend beside its own attention and its own TurboQuant.

One engine of vLLM 0.26 after another, each in a process of its own, offline, on one GPU: `CUSTOM`
is our backend at 4 bits, `TRITON_ATTN` vLLM's attention over bfloat16 (the environment has no flash
attention), `turboquant_4bit_nc` vLLM's own compressed cache. All have the same bytes for their
caches, and decode steps are CUDA graphs.

`speed`: random weights of Llama-3-8B in bfloat16; `batch` requests with one new token in every
step. Their prompts count as computed when they come, so that no time goes into them, and lie in
pages of their own, so that nothing is read twice; pages hold random bytes, for a step takes the
same time whatever they say. A time is that of whole steps of the engine, its scheduler and sampling
included, by the clock over 65 of them, the median over loops: each loop is a block long, so that
what it fills is compressed in it. `kv_tokens` is what vLLM's log says that the cache holds.

`tokens`: real weights (SmolLM2-135M, in float32), prompts of a text; our backend at 8 bits, whose
tokens should be the baseline's, and at 4, whose need not be.
`equal` are tokens before each prompt's first that is not the baseline's, summed; `lead` how far
the baseline's own token led there, at most, in log probability: a small one is a near-tie. The runs
of an engine: `first`; `prefixes cached`, in which the same prompts find theirs in the cache; `again
from nothing`, with an empty cache; `preempted`, with so few blocks that requests are put back and
resumed. `equal_first` and `lead_first` compare with the engine's own first run. What could not be
measured has a `note`. With few bits a prefix that was found, or a request that is resumed, may give
other tokens: what follows reads codes where the first run read the raw keys of its own chunk, and a
resumed request reads the raw keys of what it had generated.

`perplexity`, if it is asked for: of the same weights, over prompts that are read 64 tokens at a
time, so that nearly all of a token's past is codes; `loss` is the mean in nats, `difference` and
`error` that to the baseline's, token by token, and its standard error.

`tensor`, if it is asked for: random weights in float32, ours over one and over two GPUs.

`serve`, if it is asked for: `vllm serve` of the same real weights in bfloat16, asked for one
completion over HTTP; `start_seconds` until it was ready, `seconds` until it had answered.
`compiled` is 1 where torch compiled the model, vLLM's default, and 0 as in all other parts.
"""

import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.harness.data import MissingDataError
from experiments.harness.experiment import Claim, Row, Track, option
from experiments.harness.journal import open_journal
from experiments.speed import vllm_claims, vllm_environment, vllm_jobs
from experiments.speed.vllm_claims import IN_TREE, OURS, THEIRS
from experiments.speed.vllm_server import Server

NEEDS = "vLLM 0.26 with the extra torch, and an NVIDIA GPU of 80 GB for its full size"
KEYS = ("part", "backend", "bits", "window", "devices", "compiled", "run", "batch", "context")


@dataclass(frozen=True)
class Config:
    """What to run."""

    cases: tuple[str, ...] = option(("8x32768", "32x4096"), "batch x context")
    backends: tuple[str, ...] = option((THEIRS, OURS, IN_TREE), "the first is the baseline")
    parts: tuple[str, ...] = option(("speed", "tokens"), "also: perplexity, tensor, serve")
    model: str = option("llama-3-8b", "preset whose sizes the random weights have")
    layers: int = option(0, "layers instead of the preset's, if not 0")
    memory: int = option(48 << 30, "bytes of a cache")
    steps: int = option(64, "steps of a loop")
    repeats: int = option(3, "timed loops")
    folder: str = option("", "Hugging Face folder of SmolLM2 for `tokens`, if any", path=True)
    ids: str = option("", "JSON of token ids, one list a prompt, for `tokens`", path=True)
    bits: tuple[int, ...] = option((8, 4), "of ours, for `tokens`")
    windows: tuple[int, ...] = option((0,), "of ours, in tokens; with one there are four sinks")
    tokens: int = option(96, "tokens that are generated after each prompt")
    blocks: int = option(40, "blocks that are left to preempt requests, 0 for none")
    chunk: int = option(512, "most tokens of a step, for `tokens`: with a window, few to preempt")
    each: float = option(90.0, "most seconds of an engine, its start included")
    seconds: float = option(0.0, "start nothing after so long, 0 for never")


SMOKE = Config(
    cases=("2x200",), backends=(OURS,), model="smollm2-135m", layers=1, memory=1 << 26, steps=2,
    repeats=1,
)  # fmt: skip


def device() -> str:
    """What the rows were measured on."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def run(config: Config, track: Track) -> Iterator[Row]:
    """Engine after engine; what ours launch is compiled meanwhile."""
    if importlib.util.find_spec("vllm") is None:
        raise MissingDataError("vllm: got none; see experiments.speed.vllm_environment")
    journal = open_journal("vllm_speed", config, ("cases", "backends"))
    with tempfile.TemporaryDirectory() as folder:
        jobs = vllm_jobs.jobs_of(config, Path(folder) / "model")
        new = {name: job for name, job in jobs.items() if name not in journal.held}
        children = {
            name: (Server if job["part"] == "serve" else _Child)(Path(folder), name, job)
            for name, job in new.items()
        }
        ours = {name: job for name, job in new.items() if job["head"]["backend"] == OURS}
        sizes = {name: repr(vllm_jobs.launched(job)) for name, job in ours.items() if _has_gpu()}
        compiling = {text: _compile(text) for text in dict.fromkeys(sizes.values())}
        try:
            base: list[Row] = []
            for name in track(list(jobs), "vllm_speed"):
                if name in sizes:
                    compiling[sizes[name]].wait()
                rows = journal.held.get(name, [])
                if name in children:
                    measure = functools.partial(children[name].rows, config.each)
                    rows = journal.measure(name, measure)
                head = jobs[name]["head"]
                if head["backend"] == THEIRS or head.get("devices") == 1:
                    base = rows
                yield from (_compared(row, rows, base) for row in rows)
        finally:
            for child in children.values():
                child.close()
            for process in compiling.values():
                process.kill()


class _Child:
    """An engine's process, which imports at once and waits for its turn."""

    def __init__(self, folder: Path, name: str, job: dict[str, Any]):
        self.out, self.job = folder / f"{name}.json", job
        environment = os.environ | vllm_environment.OFFLINE | {"JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "experiments.speed.vllm_engine", str(self.out)]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=sys.stderr, text=True
        )

    def rows(self, seconds: float) -> list[Row]:
        """Its rows, and a note where it ended before its time."""
        try:
            self.process.communicate(json.dumps(self.job) + "\n", timeout=seconds)
            note = f"ended with {self.process.returncode}" if self.process.returncode else ""
        except subprocess.TimeoutExpired:
            note = f"not done after {seconds:.0f} s"
        except BrokenPipeError:
            note = "ended before its turn"
        self.close()
        rows = json.loads(self.out.read_text()) if self.out.exists() else []
        rows = [self.job["head"] | row for row in rows]
        return [*rows, *([self.job["head"] | {"note": note}] if note else [])]

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _compile(sizes: str) -> subprocess.Popen:
    """What an engine of ours launches, of such sizes, by a process beside the others."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    module = "experiments.speed.vllm_kernels"
    command = [sys.executable, "-m", module, str(10 * major + minor), sizes]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=environment, stdout=sys.stderr)


def _compared(row: Row, own: Sequence[Row], base: Sequence[Row]) -> Row:
    """Tokens beside the baseline's first, and beside the engine's own; losses beside its."""
    if "losses_of" in row:
        return _losses(row, base)
    if "tokens_of" not in row:
        return row
    found = {name: value for name, value in row.items() if name != "tokens_of"}
    found["tokens"] = sum(map(len, row["tokens_of"]))
    # over two devices as over one: each run beside the other's
    runs = (row["run"] if row["part"] == "tensor" else "first", "first")
    for (name, other), run in zip((("equal", base), ("equal_first", own)), runs, strict=True):
        first = [x for x in other if x.get("run") == run]
        if first:
            pairs = list(zip(row["tokens_of"], first[0]["tokens_of"], strict=True))
            equal = [_equal(mine, theirs) for mine, theirs in pairs]
            found[name] = sum(equal)
            leads = [y[n][1] for n, (_, y) in zip(equal, pairs, strict=True) if n < len(y)]
            if leads:
                found[name.replace("equal", "lead")] = max(leads)
    return found


def _losses(row: Row, base: Sequence[Row]) -> Row:
    found = {name: value for name, value in row.items() if name != "losses_of"}
    own = row["losses_of"]
    found |= {"tokens": len(own), "loss": statistics.mean(own)}
    if base and "losses_of" in base[0]:
        apart = [x - y for x, y in zip(own, base[0]["losses_of"], strict=True)]
        error = statistics.stdev(apart) / len(apart) ** 0.5
        found |= {"difference": statistics.mean(apart), "error": error}
    return found


def _equal(one: Sequence, other: Sequence) -> int:
    """Tokens before the first that differs."""
    pairs = zip(one, other, strict=True)
    return next((i for i, (x, y) in enumerate(pairs) if x[0] != y[0]), len(one))


def claims(rows: Sequence[Row]) -> list[Claim]:
    """See `vllm_claims`."""
    return vllm_claims.claims(rows)
