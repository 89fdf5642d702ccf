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
resumed. `equal_first` compares with the engine's own first run. What could not be measured has a
`note`.

`tensor`, if it is asked for: random weights in float32, ours over one and over two GPUs.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.harness.data import MissingDataError
from experiments.harness.experiment import Claim, Row, Track, option
from experiments.harness.journal import open_journal
from experiments.speed import vllm_claims, vllm_environment, vllm_kernels
from experiments.speed.vllm_claims import IN_TREE, OURS, THEIRS
from experiments.speed.vllm_kernels import Sizes
from turboquant_jax.models import PRESETS
from turboquant_jax.models.config import LlamaConfig
from turboquant_jax.vllm.settings import BLOCK

NEEDS = "vLLM 0.26 with the extra torch, and an NVIDIA GPU of 80 GB for its full size"
ROOM = 512
"""Tokens that a request may have beside its prompt."""


@dataclass(frozen=True)
class Config:
    """What to run."""

    cases: tuple[str, ...] = option(("8x32768", "32x4096"), "batch x context")
    backends: tuple[str, ...] = option((THEIRS, OURS, IN_TREE), "the first is the baseline")
    parts: tuple[str, ...] = option(("speed", "tokens"), "what to measure; also: tensor")
    model: str = option("llama-3-8b", "preset whose sizes the random weights have")
    layers: int = option(0, "layers instead of the preset's, if not 0")
    memory: int = option(48 << 30, "bytes of a cache")
    steps: int = option(64, "steps of a loop")
    repeats: int = option(3, "timed loops")
    folder: str = option("", "Hugging Face folder of SmolLM2 for `tokens`, if any", path=True)
    ids: str = option("", "JSON of token ids, one list a prompt, for `tokens`", path=True)
    bits: tuple[int, ...] = option((8, 4), "of ours, for `tokens`")
    tokens: int = option(96, "tokens that are generated after each prompt")
    blocks: int = option(40, "blocks that are left to preempt requests, 0 for none")
    each: float = option(90.0, "most seconds of an engine, its start included")
    seconds: float = option(0.0, "start nothing after so long, 0 for never")


SMOKE = Config(("2x200",), (OURS,), "smollm2-135m", 1, 1 << 26, 2, 1)


def device() -> str:
    """What the rows were measured on."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def run(config: Config, track: Track) -> Iterator[Row]:
    """Engine after engine; what ours launch is compiled meanwhile."""
    if importlib.util.find_spec("vllm") is None:
        raise MissingDataError("vllm: got none; see experiments.speed.vllm_environment")
    journal = open_journal("vllm_speed", config, ("cases", "backends"))
    jobs = _jobs(config)
    with tempfile.TemporaryDirectory() as folder:
        _add_tensor(jobs, config, Path(folder) / "model")
        children = {name: _Child(Path(folder), name, job) for name, job in jobs.items()}
        ours = {name: job for name, job in jobs.items() if job["head"]["backend"] == OURS}
        compiling = {name: _compile(job) for name, job in ours.items()} if _has_gpu() else {}
        try:
            base: list[Row] = []
            for name in track(list(jobs), "vllm_speed"):
                if name in compiling:
                    compiling[name].wait()
                measure = functools.partial(children[name].rows, config.each)
                rows = journal.measure(name, measure)
                first = name.startswith(f"tokens {THEIRS}") or name.endswith(" 1")
                base = rows if first else base
                yield from (_compared(row, rows, base) for row in rows)
        finally:
            for child in children.values():
                child.close()
            for process in compiling.values():
                process.kill()


def _jobs(config: Config) -> dict[str, dict[str, Any]]:
    """Every engine, by name."""
    jobs: dict[str, dict[str, Any]] = {}
    batches = sorted({int(case.partition("x")[0]) for case in config.cases})
    longest = max(int(case.partition("x")[2]) for case in config.cases)
    for backend in config.backends if "speed" in config.parts else ():
        head = {"part": "speed", "backend": backend, "bits": 16 if backend == THEIRS else 4}
        jobs[f"speed {backend}"] = {
            "part": "speed", "head": head, "model": _described(_sizes(config)), "folder": "",
            "cases": config.cases, "steps": config.steps, "repeats": config.repeats,
            "settings": _settings(
                backend, 4, dtype="bfloat16", kv_cache_memory_bytes=config.memory,
                max_model_len=longest + ROOM, max_num_seqs=max(batches),
                max_num_batched_tokens=2048, graphs=batches, load_format="dummy",
                enable_prefix_caching=False,
            ),
        }  # fmt: skip
    real = [(THEIRS, 32)] * (THEIRS in config.backends) + [(OURS, bits) for bits in config.bits]
    for backend, bits in real if config.folder and "tokens" in config.parts else ():
        prompts = json.loads(Path(config.ids).read_text())
        jobs[f"tokens {backend} {bits}"] = {
            "part": "tokens", "head": {"part": "tokens", "backend": backend, "bits": bits},
            "model": None, "folder": config.folder, "prompts": prompts, "tokens": config.tokens,
            "blocks": config.blocks if backend == OURS else 0,
            "settings": _settings(
                backend, bits, dtype="float32", kv_cache_memory_bytes=1 << 30,
                max_model_len=2048, max_num_seqs=len(prompts), max_num_batched_tokens=512,
                graphs=[len(prompts)],
            ),
        }  # fmt: skip
    # theirs last: it is the one that may not start
    return dict(sorted(jobs.items(), key=lambda job: job[1]["head"]["backend"] == IN_TREE))


def _add_tensor(jobs: dict[str, dict[str, Any]], config: Config, folder: Path) -> None:
    """Engines of one and of two devices over the same weights, if they are asked for."""
    if "tensor" not in config.parts:
        return
    vllm_environment.save_random(folder)
    prompts = [one["prompt_token_ids"] for one in vllm_environment.prompts()]
    prompts = [[token % 2000 + 3 for token in prompt] for prompt in prompts]
    for bits in config.bits:
        for devices in (1, 2):
            head = {"part": "tensor", "backend": OURS, "bits": bits, "devices": devices}
            jobs[f"tensor {bits} {devices}"] = {
                "part": "tensor", "head": head, "model": None, "folder": str(folder),
                "prompts": prompts, "tokens": config.tokens,
                "settings": _settings(
                    OURS, bits, dtype="float32", kv_cache_memory_bytes=1 << 30,
                    max_model_len=2048, max_num_seqs=len(prompts), max_num_batched_tokens=512,
                    graphs=[len(prompts)], tensor_parallel_size=devices,
                    disable_custom_all_reduce=True,
                ),
            }  # fmt: skip


def _settings(backend: str, bits: int, *, graphs: list[int], **settings: Any) -> dict[str, Any]:
    """Of an engine whose decode steps are CUDA graphs, and nothing else is compiled."""
    settings["compilation_config"] = {
        "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": graphs
    }  # fmt: skip
    if backend == IN_TREE:
        return settings | {"kv_cache_dtype": IN_TREE}
    settings["attention_config"] = {"backend": backend}
    if backend == OURS:
        settings |= {"block_size": BLOCK, "additional_config": {"turboquant": {"bits": bits}}}
    return settings


def _sizes(config: Config) -> LlamaConfig:
    sizes = PRESETS[config.model]
    return replace(sizes, num_layers=config.layers or sizes.num_layers)


def _described(sizes: LlamaConfig) -> dict[str, Any]:
    """The model as a Hugging Face configuration."""
    return dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size, num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads, num_key_value_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim, vocab_size=sizes.vocab_size, max_position_embeddings=65536,
        rms_norm_eps=sizes.rms_norm_eps, rope_theta=sizes.rope_theta, torch_dtype="bfloat16",
        hidden_act="silu", tie_word_embeddings=sizes.tie_embeddings, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip


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


def _compile(job: dict[str, Any]) -> subprocess.Popen:
    """What an engine of ours launches, by a process beside the others."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    module = "experiments.speed.vllm_kernels"
    command = [sys.executable, "-m", module, str(10 * major + minor), repr(_launched(job))]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=environment, stdout=sys.stderr)


def _launched(job: dict[str, Any]) -> Sizes:
    """What decides the programs of an engine of ours."""
    from turboquant_jax.vllm.step import rows_of

    settings, model = job["settings"], job["model"]
    if model is None:
        model = json.loads((Path(job["folder"]) / "config.json").read_text())
    heads, devices = model["num_attention_heads"], settings.get("tensor_parallel_size", 1)
    sizes = Sizes(
        heads=heads // devices,
        kv_heads=model["num_key_value_heads"] // devices,
        head_dim=model.get("head_dim") or model["hidden_size"] // heads,
        bits=settings["additional_config"]["turboquant"]["bits"],
        dtype=settings["dtype"],
        requests=settings["max_num_seqs"],
        context=settings["max_model_len"],
        pages=1,
        batches=tuple(settings["compilation_config"]["cudagraph_capture_sizes"]),
    )
    if job["part"] != "speed":  # single tokens beside chunks are any number
        padded = {rows_of(count, sizes.requests) for count in range(1, sizes.requests + 1)}
        sizes = replace(sizes, batches=tuple(sorted(padded)))
    memory = settings["kv_cache_memory_bytes"]
    return replace(sizes, pages=vllm_kernels.pages_of(sizes, model["num_hidden_layers"], memory))


def _compared(row: Row, own: Sequence[Row], base: Sequence[Row]) -> Row:
    """Tokens beside the baseline's first, and beside the engine's own."""
    if "tokens_of" not in row:
        return row
    found = {name: value for name, value in row.items() if name != "tokens_of"}
    found["tokens"] = sum(map(len, row["tokens_of"]))
    for name, other in (("equal", base), ("equal_first", own)):
        first = [x for x in other if x.get("run") == "first"]
        if first:
            pairs = list(zip(row["tokens_of"], first[0]["tokens_of"], strict=True))
            equal = [_equal(mine, theirs) for mine, theirs in pairs]
            found[name] = sum(equal)
            leads = [y[n][1] for n, (_, y) in zip(equal, pairs, strict=True) if n < len(y)]
            if leads and name == "equal":
                found["lead"] = max(leads)
    return found


def _equal(one: Sequence, other: Sequence) -> int:
    """Tokens before the first that differs."""
    pairs = zip(one, other, strict=True)
    return next((i for i, (x, y) in enumerate(pairs) if x[0] != y[0]), len(one))


def claims(rows: Sequence[Row]) -> list[Claim]:
    """See `vllm_claims`."""
    return vllm_claims.claims(rows)
