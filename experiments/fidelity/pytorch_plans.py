"""Compile ahead, on a CPU, what `pytorch_speed` and `pytorch_greedy` launch.

python -m experiments.fidelity.pytorch_plans 90 smollm2-135m

The number is the compute capability of the GPU; without names it is all models. Plans and machine
code go where a run finds them, into the cache of launch plans, if jax and triton are of the same
versions here and there.
"""

import itertools
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from math import ceil
from multiprocessing import get_context
from typing import NamedTuple
from unittest import mock

import torch

from experiments.fidelity import pytorch_greedy
from experiments.speed import pytorch_speed
from turboquant_jax.cache.config import CacheConfig, CodecConfig
from turboquant_jax.cache.presets import Preset
from turboquant_jax.cache.presets import preset as preset_config
from turboquant_jax.models import PRESETS
from turboquant_jax.models.frequencies import inverse_frequencies
from turboquant_jax.pytorch import choose, creation, kernels, plan_store, runner
from turboquant_jax.pytorch.segments import Scores

Call = tuple[str, str, plan_store.Shapes, plan_store.Shapes]
TEXTS = (("smollm2-135m", 8, 8192), ("qwen2.5-0.5b", 16, 4096))
"""Models of `pytorch_greedy` by their sizes, and the texts of which they have perplexities."""


class Job(NamedTuple):
    """A cache for the sizes of a model: sequences, capacity, the dtype of queries, a prompt."""

    model: str
    config: CacheConfig
    batch: int
    capacity: int
    dtype: str
    prompt: int = 0


def cache_of(model: str, preset: Preset, dtype: str) -> CacheConfig:
    """The cache of a preset for the sizes of a model."""
    sizes = PRESETS[model]
    heads = sizes.num_layers, sizes.num_kv_heads, sizes.head_dim
    found = preset_config(preset, *heads, tuple(inverse_frequencies(sizes).tolist()))
    return replace(found, dtype=dtype)


def jobs() -> Iterator[Job]:
    """Of both experiments."""
    speed, greedy = pytorch_speed.Config(), pytorch_greedy.Config()
    for case in speed.cases:
        batch, context = map(int, case.split("x"))
        own = cache_of("llama-3-8b", "balanced", "bfloat16")
        scalar = replace(own, key=CodecConfig(4), value=CodecConfig(4))
        for config in (scalar, own):
            yield Job("llama-3-8b", config, batch, context + speed.steps + 1, "bfloat16")
    for model, texts, context in TEXTS:
        for preset, dtype in itertools.product(greedy.presets, greedy.dtypes):
            config = cache_of(model, preset, dtype)
            yield Job(model, config, 1, greedy.prompt + greedy.tokens, dtype, greedy.prompt)
        for preset in greedy.presets:
            config = cache_of(model, preset, "bfloat16")
            yield Job(model, config, texts, context, "float32", pytorch_greedy.FIRST)


def recorded(job: Job) -> list[Call]:
    """The calls of a prompt, a step and completed blocks, on tensors that are never touched."""
    config, batch = job.config, job.batch
    found: dict[Call, None] = {}

    def record(name, spec, read, written, outputs):
        found[name, spec, runner.shapes_of(read), runner.shapes_of(written)] = None

    sizes = (PRESETS[job.model].num_heads, config.num_kv_heads, config.num_kv_heads)
    dtype = getattr(torch, job.dtype)
    with mock.patch.object(runner, "run", record):
        with mock.patch.object(torch, "zeros", torch.empty):  # no memory, however large
            state = creation.create(config, batch, job.capacity)
        heads = tuple(torch.zeros(batch, 1, n, config.head_dim, dtype=dtype) for n in sizes)
        choose.attend_and_write(state, 0, heads, Scores(), None, "kernels")
        if config.key.code == "scalar":
            choose.commit(state, None, "kernels")
            return list(found)
        blocks = batch, config.block, config.num_layers * config.num_kv_heads
        chunk = batch * ceil(job.prompt / config.block), config.block, config.num_kv_heads
        for codec, shape in itertools.product(state.parts[0].codecs, (blocks, chunk)):
            group = codec.groups[0]
            rows = torch.zeros(1).expand(*shape, config.head_dim)
            kernels.trellis_search(rows, group.levels, group.constants.levels)
    return [call for call in found if call[2][0][0][-1]]  # a chunk of nothing is no call


def compiled(job: Job, capability: int) -> str:
    """Compile the calls of a job; what they took."""
    words = []
    for call in recorded(job):
        begin = time.perf_counter()
        for kernel in plan_store.plan_of(*call).kernels:
            binary = plan_store.code_of(kernel, capability)
            words.append(f"{kernel.name} {time.perf_counter() - begin:.0f} s")
            words += [f"({binary.spilled} bytes spilled)"] * bool(binary.spilled)
    code = f"{job.config.key.code} {job.config.key.bits} {job.config.value.bits}"
    return f"{job.model} {code} {job.batch} x {job.capacity} {job.dtype}: " + ", ".join(words)


def main(capability: int, *names: str) -> None:
    """The jobs of these models, or all, as many at a time as there are cores."""
    torch.set_num_threads(1)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        some = [job for job in jobs() if not names or job.model in names]
        for words in pool.map(compiled, some, itertools.repeat(capability)):
            print(words, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
