"""Real weights under PyTorch beside our own decoder: the same tokens, the same perplexity.

SmolLM2-135M-Instruct in transformers' `LlamaForCausalLM`, or Qwen2.5-Coder in `Qwen2ForCausalLM`,
their weights read from GGUF.

`greedy`: transformers' `generate` with a captured step over a `TurboQuantCache`. Our own decoder is
given the same tokens one by one, with a cache of the same configuration and seed, on the same
device; `tokens_equal` are those before the first that it would not have chosen, `tokens_agreeing`
all that it would. Where they part, `gap_torch` and `gap_jax` say how far the best token leads in
the logits of each, and `logit_difference` how far these are apart at most: gaps of that order are a
near-tie.

`perplexity`: the test texts of `fidelity`, token by token through the captured step, the model in
float32 and the cache in bfloat16 as there; KL and agreement are against the model's own attention
in full precision.

Needs the extra `torch`; the GPU must be left to torch at first: `JAX_PLATFORMS=cpu`.
"""

import contextlib
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.fidelity import pytorch_greedy_claims
from experiments.harness import prepared
from experiments.harness.data import MissingDataError, require_torch
from experiments.harness.experiment import Row, Track, option
from experiments.harness.journal import open_journal
from experiments.speed import pytorch_speed
from turboquant_jax.cache.presets import Preset
from turboquant_jax.cli.demonstration import default_text
from turboquant_jax.models.checkpoint import packaged_smollm2
from turboquant_jax.models.gguf import open_gguf
from turboquant_jax.models.gguf_tokenizer import tokenizer_from_gguf

NEEDS = "the extra torch, token ids in .data/ by python -m experiments.tasks.pack_data, and a GPU"
KEYS = ("model", "part", "preset", "dtype", "captured", "fused")

FIRST = 128
"""Tokens that go first, as one chunk: the window of the presets holds them all."""
PERPLEXITY = 0.75
"""Of the time, the share after which no perplexity begins."""


@dataclass(frozen=True)
class Config:
    """What to run."""

    presets: tuple[Preset, ...] = option(
        ("lossless", "max", "balanced", "compact"), "presets of the cache"
    )
    dtypes: tuple[str, ...] = option(("float32", "bfloat16"), "of the model, for greedy")
    parts: tuple[str, ...] = option(
        ("perplexity", "greedy"), "what to run", choices=("perplexity", "greedy")
    )
    prompt: int = option(512, "tokens of the prompt")
    tokens: int = option(256, "tokens that are generated")
    context: int = option(8192, "tokens of the texts")
    texts: str = option("test", "test texts, or the packaged novel", choices=("test", "novel"))
    model: str = option(prepared.SMOLLM2, f"one of {', '.join(prepared.MODELS)}")
    checkpoint: str = option("", "its GGUF file, if neither in .data/ nor packaged", path=True)
    fuse: bool = option(False, "fused steps, with few kernels between the matrices")
    seconds: float = option(0.0, "start nothing after so long, 0 for never")


SMOKE = Config(("max",), ("float32",), ("perplexity", "greedy"), 210, 3, 40, "novel")
device = pytorch_speed.device


def run(config: Config, track: Track) -> Iterator[Row]:
    """Generate; perplexities, while our own decoder compiles; then compare what it chooses."""
    require_torch()
    import torch

    from experiments.harness import torch_models

    try:
        path = Path(config.checkpoint) if config.checkpoint else _weights(config.model)
    except FileNotFoundError as error:
        raise MissingDataError(str(error)) from error
    jobs = [(preset, dtype) for dtype in config.dtypes for preset in config.presets]
    jobs *= "greedy" in config.parts
    journal = open_journal("pytorch_greedy", config, ("presets", "dtypes", "parts"))
    where = torch_models.device()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        file = {job: Path(folder, "-".join(job) + ".npz") for job in jobs}
        missing = [job for job in jobs if " ".join(job) not in journal.held]
        theirs = {job: _start_jax(path, config, file[job], stack) for job in missing}

        @functools.cache
        def model_in(dtype: str) -> Any:
            return torch_models.model_of_gguf(path, getattr(torch, dtype), where)

        @functools.cache
        def choose(preset: Preset, dtype: str) -> None:
            held = file[preset, dtype]
            _generate(config, model_in(dtype), preset, _prompt(path, config), held)
            print(f"{preset} {dtype}: torch has chosen", file=sys.stderr, flush=True)

        def greedy(preset: Preset, dtype: str) -> list[Row]:
            choose(preset, dtype)
            if theirs[preset, dtype].wait():
                raise RuntimeError("our own decoder failed; its words are above")
            own = file[preset, dtype]
            with np.load(own) as ours, np.load(own.with_suffix(".out.npz")) as other:
                compared = _compared(ours["logits"], other["logits"])
            head: Row = {"model": config.model, "part": "greedy", "preset": preset, "dtype": dtype}
            head |= {"captured": 1, "fused": int(config.fuse), "context": config.prompt}
            return [head | compared]

        def perplexity(preset: Preset) -> list[Row]:
            return [_perplexity(config, model_in("float32"), preset, _texts(path, config))]

        for job in missing:
            choose(*job)
        for preset in config.presets * ("perplexity" in config.parts):  # while the other compiles
            measure = functools.partial(perplexity, preset)
            yield from journal.measure(preset, measure, share=PERPLEXITY)
        for preset, dtype in track(jobs, "pytorch_greedy"):
            compare = functools.partial(greedy, preset, dtype)
            yield from journal.measure(f"{preset} {dtype}", compare)


def _weights(model: str) -> Path:
    file = prepared.weights_file(model)
    return packaged_smollm2() if model == prepared.SMOLLM2 and not file.is_file() else file


def _tokenizer(path: Path):
    return tokenizer_from_gguf(open_gguf(path).metadata, ())


def _prompt(path: Path, config: Config) -> np.ndarray:
    return np.asarray([_tokenizer(path).encode(default_text())[: config.prompt]])


def _texts(path: Path, config: Config) -> np.ndarray:
    if config.texts == "test":
        texts = prepared.texts(prepared.TEST, config.context, model=config.model)
        return np.concatenate(list(texts.values()))
    count = 2 * config.context
    return np.asarray(_tokenizer(path).encode(default_text())[:count]).reshape(2, -1)


def _generate(config: Config, model, preset: Preset, prompt: np.ndarray, file: Path) -> None:
    """What `generate` read and chose goes into a file, with its logits [tokens, V]."""
    import torch

    from turboquant_jax.pytorch import TurboQuantCache, supported

    model.set_attn_implementation("turboquant")
    capacity = config.prompt + config.tokens
    cache = TurboQuantCache.from_model(model, preset, capacity=capacity)
    ids = torch.from_numpy(prompt).to(model.device)
    with cache.capture(model, fuse=config.fuse):
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=config.tokens,
            do_sample=False, return_dict_in_generate=True, output_logits=True,
            **{supported.CACHE: cache},
        )  # fmt: skip
    tokens = found.sequences[0, prompt.shape[1] :].cpu().numpy()
    logits = torch.stack([x[0].float() for x in found.logits]).cpu().numpy()
    whole = file.with_suffix(".part.npz")
    np.savez(whole, prompt=prompt, tokens=tokens, config=repr(cache.config), logits=logits)
    whole.rename(file)


def _start_jax(
    path: Path, config: Config, file: Path, stack: contextlib.ExitStack
) -> subprocess.Popen:
    """Our own decoder in a process of its own, which compiles until the file is there."""
    import torch

    backend = "gpu" if torch.cuda.is_available() else "cpu"
    changes = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    changes |= {"JAX_PLATFORMS": "cpu" if backend == "cpu" else "cuda,cpu"}
    sizes = str(config.tokens), str(config.prompt), str(os.getpid())
    module = "experiments.fidelity.greedy_in_jax"
    program = [sys.executable, "-m", module, str(path), str(file), backend, *sizes]
    process = subprocess.Popen(program, env=os.environ | changes)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def _compared(torch_logits: np.ndarray, jax_logits: np.ndarray) -> Row:
    """Both saw the same tokens before every row of logits."""
    agrees = torch_logits.argmax(axis=1) == jax_logits.argmax(axis=1)
    count = len(agrees)
    first = int(agrees.argmin()) if not agrees.all() else count
    apart = np.abs(torch_logits - jax_logits).max(axis=1)
    row: Row = {
        "tokens": count,
        "tokens_equal": first,
        "tokens_agreeing": int(agrees.sum()),
        "logit_difference_median": float(np.median(apart)),
    }
    if first == count:
        return row
    for name, logits in (("torch", torch_logits), ("jax", jax_logits)):
        second, best = np.sort(logits[first])[-2:]
        row[f"gap_{name}"] = float(best - second)
    worst = max(
        float(np.diff(np.sort(x[i])[-2:])[0] / apart[i])
        for i in np.flatnonzero(~agrees)
        for x in (torch_logits, jax_logits)
    )
    return row | {"logit_difference": float(apart[first]), "largest_gap_over_difference": worst}


def _perplexity(config: Config, model, preset: Preset, texts: np.ndarray) -> Row:
    from experiments.fidelity import pytorch_forcing
    from turboquant_jax.pytorch import supported

    cache_config = replace(supported.cache_config(model, preset), dtype="bfloat16")
    found = pytorch_forcing.losses(model, cache_config, texts, config.fuse)
    return {
        "model": config.model, "part": "perplexity", "preset": preset, "dtype": "float32",
        "captured": 1,
        "fused": int(config.fuse), "context": texts.shape[1], "tokens": found["nll"].size,
        "perplexity_full": float(np.exp(found["full"].mean())),
        "perplexity": float(np.exp(found["nll"].mean())),
        "perplexity_change": float(np.exp((found["nll"] - found["full"]).mean()) - 1),
        "kl": float(found["kl"].mean()), "top1": float(found["agrees"].mean()),
    }  # fmt: skip


def claims(rows: Sequence[Row]):
    """See `pytorch_greedy_claims`."""
    return pytorch_greedy_claims.claims(rows)
