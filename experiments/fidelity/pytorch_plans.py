"""Compile ahead, on a CPU, what `pytorch_speed` and `pytorch_greedy` launch.

python -m experiments.fidelity.pytorch_plans 90 smollm2-135m

The number is the compute capability of the GPU; without names it is all models. Plans and machine
code go where a run finds them, into the cache of launch plans.
"""

import itertools
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

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


def cache_of(model: str, preset: Preset, dtype: str) -> CacheConfig:
    """The cache of a preset for the sizes of a model."""
    sizes = PRESETS[model]
    heads = sizes.num_layers, sizes.num_kv_heads, sizes.head_dim
    found = preset_config(preset, *heads, tuple(inverse_frequencies(sizes).tolist()))
    return replace(found, dtype=dtype)


def jobs() -> Iterator[tuple[str, CacheConfig, int, int, str]]:
    """(model, cache, sequences, capacity, dtype of queries) of both experiments."""
    speed, greedy = pytorch_speed.Config(), pytorch_greedy.Config()
    for case in speed.cases:
        batch, context = map(int, case.split("x"))
        own = cache_of("llama-3-8b", "balanced", "bfloat16")
        scalar = replace(own, key=CodecConfig(4), value=CodecConfig(4))
        for config in (scalar, own):
            yield "llama-3-8b", config, batch, context + speed.steps + 1, "bfloat16"
    for preset, dtype in itertools.product(greedy.presets, greedy.dtypes):
        config = cache_of("smollm2-135m", preset, dtype)
        yield "smollm2-135m", config, 1, greedy.prompt + greedy.tokens, dtype
    for preset in greedy.presets:
        config = cache_of("smollm2-135m", preset, "bfloat16")
        yield "smollm2-135m", config, 8, greedy.context, "float32"


def recorded(model: str, config: CacheConfig, batch: int, capacity: int, dtype: str) -> list[Call]:
    """The calls of a step and of a completed block, on tensors that are never touched."""
    found: dict[Call, None] = {}

    def record(name, spec, read, written, outputs):
        found[name, spec, runner.shapes_of(read), runner.shapes_of(written)] = None

    runner.run = record
    state = creation.create(config, batch, capacity)
    sizes = (PRESETS[model].num_heads, config.num_kv_heads, config.num_kv_heads)
    heads = tuple(
        torch.zeros(batch, 1, n, config.head_dim, dtype=getattr(torch, dtype)) for n in sizes
    )
    choose.attend_and_write(state, 0, heads, Scores(), None, "kernels")
    if config.key.code == "scalar":
        choose.commit(state, None, "kernels")
    else:
        for codec in state.parts[0].codecs:
            blocks = torch.zeros(1).expand(batch, config.block, len(state.parts[0].heads), -1)
            blocks = blocks[..., :1].expand(*blocks.shape[:-1], config.head_dim)
            group = codec.groups[0]
            kernels.trellis_search(blocks, group.levels, group.constants.levels)
    return list(found)


def compiled(job: tuple, capability: int) -> str:
    """Compile the calls of a job; what they took."""
    words = []
    for call in recorded(*job):
        begin = time.perf_counter()
        for kernel in plan_store.plan_of(*call).kernels:
            binary = plan_store.code_of(kernel, capability)
            words.append(f"{kernel.name} {time.perf_counter() - begin:.0f} s")
            words += [f"({binary.spilled} bytes spilled)"] * bool(binary.spilled)
    model, config, batch, capacity, dtype = job
    return (
        f"{model} {config.key.code} {config.key.bits} {batch} x {capacity} {dtype}: "
        + ", ".join(words)
    )


def main(capability: int, *names: str) -> None:
    """The jobs of these models, or all, as many at a time as there are cores."""
    torch.set_num_threads(1)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        some = [job for job in jobs() if not names or job[0] in names]
        for words in pool.map(compiled, some, itertools.repeat(capability)):
            print(words, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
