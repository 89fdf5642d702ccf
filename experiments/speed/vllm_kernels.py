"""Compile ahead, on CPU cores, what our backend for vLLM launches in an engine of known sizes.

An engine would compile it at its start. Here it is done while other engines are measured: launch
plans and machine code go where the engine finds them.
"""

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context

from turboquant_jax.cache.config import CacheConfig, CodecConfig
from turboquant_jax.pytorch import plan_store
from turboquant_jax.vllm.settings import BLOCK, SINKS

Call = tuple[str, str, plan_store.Shapes, plan_store.Shapes]


@dataclass(frozen=True)
class Sizes:
    """What decides the programs of an engine.

    Attributes:
      heads, kv_heads, head_dim: of the model.
      bits: of keys and values.
      dtype: of the model.
      requests: most at a time.
      context: tokens of the longest.
      pages: blocks that the engine has.
      batches: of single tokens.
      window: in full precision, with sinks.
    """

    heads: int
    kv_heads: int
    head_dim: int
    bits: int
    dtype: str
    requests: int
    context: int
    pages: int
    batches: tuple[int, ...]
    window: int = 0


def pages_of(sizes: Sizes, layers: int, memory: int) -> int:
    """Blocks that vLLM makes of some bytes."""
    return memory // (layers * BLOCK * sizes.kv_heads * _page_bytes(sizes))


def recorded(sizes: Sizes) -> list[Call]:
    """The calls of steps with and without a past, on memory that is never touched."""
    import torch

    from turboquant_jax.pytorch import runner
    from turboquant_jax.pytorch.segments import Scores
    from turboquant_jax.vllm.steps import Steps
    from turboquant_jax.vllm.windowed import WindowedSteps

    found: dict[Call, None] = {}

    def record(name, spec, read, written, outputs):
        found[name, spec, runner.shapes_of(read), runner.shapes_of(written)] = None

    before, runner.run = runner.run, record
    try:
        layer, dtype = _layer(sizes), getattr(torch, sizes.dtype)
        columns = -(-sizes.context // BLOCK)
        kind = WindowedSteps if sizes.window else Steps
        steps = kind([layer], sizes.requests, columns, torch.device("cpu"))
        chunk, past = BLOCK + 2, BLOCK + sizes.window + 2 * SINKS
        for batch, new in [*((b, 1) for b in sizes.batches), (1, chunk)]:
            starts, seen = [i * new for i in range(batch + 1)], [past + new] * batch
            after, begins = (torch.tensor(x, dtype=torch.int32) for x in (seen, starts))
            table = torch.ones(batch, columns, dtype=torch.int32)
            step = steps.batch(table, after, begins, batch * (new == 1), starts, seen)
            step = steps.complete(step, after)
            counts = sizes.heads, sizes.kv_heads, sizes.kv_heads
            heads = [torch.zeros(batch * new, n, sizes.head_dim, dtype=dtype) for n in counts]
            layer.run(*heads, step, Scores())
    finally:
        runner.run = before
    return list(found)


def compile_call(call: Call, capability: int) -> str:
    """Its plan and its code; what that took."""
    begin = time.perf_counter()
    words = []
    for kernel in plan_store.plan_of(*call).kernels:
        traced = time.perf_counter() - begin
        plan_store.code_of(kernel, capability)
        words.append(f"{kernel.name} plan {traced:.0f} s, all {time.perf_counter() - begin:.0f} s")
    return "; ".join(words)


def _config(sizes: Sizes) -> CacheConfig:
    dim = sizes.head_dim
    codec = CodecConfig(sizes.bits)
    if dim & (dim - 1):
        codec = replace(codec, rotation="haar")
    frequencies = tuple(1e4 ** -(2 * i / dim) for i in range(dim // 2))  # not in programs
    return CacheConfig(
        1, sizes.kv_heads, dim, codec, codec, block=BLOCK, window=sizes.window,
        sinks=SINKS if sizes.window else 0,
        rope_frequencies=frequencies, dtype=sizes.dtype,
    )  # fmt: skip


def _codecs(config: CacheConfig):
    import torch

    from turboquant_jax.pytorch import codec, constants

    (pair,) = constants.codecs_of(config, 0)
    key, value = (codec.create(own, None, None, torch.device("cpu")) for own in pair)
    return key, value


def _page_bytes(sizes: Sizes) -> int:
    from turboquant_jax.vllm import pages

    config = _config(sizes)
    return pages.token_bytes(config, _codecs(config))


def _layer(sizes: Sizes):
    import torch

    from turboquant_jax.pytorch import pre_rope
    from turboquant_jax.vllm import pages, raw
    from turboquant_jax.vllm.step import Layer
    from turboquant_jax.vllm.windowed import Windowed

    config, cpu = _config(sizes), torch.device("cpu")
    codecs = _codecs(config)
    shape = sizes.pages, config.num_kv_heads, BLOCK, pages.token_bytes(config, codecs)
    memory = torch.zeros(shape, dtype=torch.uint8)
    dtype, open_ = getattr(torch, sizes.dtype), 0 if sizes.window else BLOCK
    held = (sizes.requests + 1, open_, config.num_kv_heads, config.head_dim)
    keys, values = (torch.zeros(held, dtype=dtype) for _ in range(2))
    own = pages.carve(memory, config, codecs)
    of = config, pre_rope.create(config, sizes.context, cpu), keys, values, own, True
    return Windowed(*of, raw=raw.over(own, config, dtype)) if sizes.window else Layer(*of)


def main(capability: int, *texts: str) -> None:
    """Compile the calls of engines, each a `Sizes` as text, on all cores."""
    begin = time.perf_counter()
    calls = list(dict.fromkeys(call for text in texts for call in recorded(eval(text))))
    print(f"{len(calls)} calls after {time.perf_counter() - begin:.0f} s", flush=True)
    cores = min(len(calls), os.cpu_count() or 1)
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        for words in pool.map(compile_call, calls, [capability] * len(calls)):
            print(words, flush=True)
    print(f"compiled after {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
