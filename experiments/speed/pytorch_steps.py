"""Caches of `pytorch_speed`, filled, and their steps; imports torch and transformers."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.utils import (
    is_flash_attn_2_available,
    is_hqq_available,
    is_optimum_quanto_available,
)

from experiments.harness.experiment import Row
from turboquant_jax.cache.config import CodecConfig
from turboquant_jax.pytorch import supported
from turboquant_jax.pytorch.huggingface import TurboQuantCache
from turboquant_jax.pytorch.state import State

OURS = ("4 bits", "balanced")
WARM_UP = 3
ONE = 0x3F803F80  # a scale word: 1.0 for the key and for the value
PATTERN = 61  # random pages that repeat


@dataclass(frozen=True)
class Steps:
    """`step` takes tokens [B, 1] to logits [B, 1, V]; `rewind` forgets what steps have added."""

    step: Callable[[Tensor], Tensor]
    rewind: Callable[[], None]
    nbytes: Callable[[], int]


def missing(name: str) -> str | None:
    """Why a cache cannot be had, in words."""
    if name == "dynamic flash" and not is_flash_attn_2_available():
        return "flash-attn is not installed"
    if name == "quantized" and not (is_hqq_available() or is_optimum_quanto_available()):
        return "neither hqq nor optimum-quanto is installed"
    return None


def dynamic(model: Any, name: str, sizes: tuple[int, int, int], how: str) -> Steps:
    """transformers' DynamicCache, which grows with every step."""
    batch, context, _ = sizes
    flash = name == "dynamic flash"
    model.set_attn_implementation("flash_attention_2" if flash else "sdpa")
    cache = transformers.DynamicCache(config=model.config)
    _fill(model, cache, batch, context)

    def step(ids: Tensor) -> Tensor:
        return model(ids, use_cache=True, **{supported.CACHE: cache}).logits

    def nbytes() -> int:
        return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))

    return Steps(step, lambda: None, nbytes)


def static(model: Any, name: str, sizes: tuple[int, int, int], how: str) -> Steps:
    """transformers' StaticCache, with room for all steps."""
    batch, context, room = sizes
    model.set_attn_implementation("sdpa")
    cache = transformers.StaticCache(config=model.config, max_cache_len=context + room)
    _fill(model, cache, batch, context)
    ids = torch.zeros((batch, 1), dtype=torch.long, device=model.device)
    positions = torch.full_like(ids, context)

    def forward() -> Tensor:
        held = {supported.CACHE: cache}
        return model(ids, position_ids=positions, use_cache=True, **held).logits

    def rewind() -> None:
        positions.fill_(context)
        for layer in cache.layers:
            layer.cumulative_length.fill_(context)

    run = _graph(forward, rewind) if how and model.device.type == "cuda" else forward

    def step(new: Tensor) -> Tensor:
        ids.copy_(new)
        logits = run()
        positions.add_(1)
        return logits

    def nbytes() -> int:
        return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))

    return Steps(step, rewind, nbytes)


def quantized(model: Any, name: str, sizes: tuple[int, int, int], how: str) -> Steps:
    """transformers' QuantizedCache at 4 bits, which appends to what it dequantizes."""
    batch, context, _ = sizes
    model.set_attn_implementation("sdpa")
    backend = "hqq" if is_hqq_available() else "quanto"
    cache = transformers.QuantizedCache(backend, model.config, nbits=4)
    _fill(model, cache, batch, context)

    def step(ids: Tensor) -> Tensor:
        return model(ids, use_cache=True, **{supported.CACHE: cache}).logits

    def nbytes() -> int:
        held = ("keys", "values", "_quantized_keys", "_quantized_values")
        return sum(_bytes(getattr(layer, name)) for layer in cache.layers for name in held)

    return Steps(step, lambda: None, nbytes)


def _bytes(x: Any) -> int:
    """Of a tensor, or of what a quantized one consists of; hqq has pairs of a tensor and a dict."""
    if isinstance(x, tuple):
        return _bytes(x[0]) + sum(y.nbytes for y in x[1].values() if isinstance(y, Tensor))
    if hasattr(x, "__tensor_flatten__"):
        return sum(_bytes(getattr(x, name)) for name in x.__tensor_flatten__()[0])
    return x.nbytes


def ours(model: Any, name: str, sizes: tuple[int, int, int], how: str) -> Steps:
    """A TurboQuantCache, whose lengths are set back after a loop."""
    batch, context, room = sizes
    model.set_attn_implementation("turboquant")
    if name == "balanced":
        config = supported.cache_config(model, "balanced")
    else:
        codec = CodecConfig(int(name.split()[0]))
        config = replace(supported.cache_config(model), key=codec, value=codec)
    capacity = context + room
    cache = TurboQuantCache.from_model(model, config=config, capacity=capacity)
    _fill_codes(cache.room(batch, context, model.device))

    def rewind() -> None:
        assert cache.state is not None
        cache.state.table.lengths.fill_(context)
        steps = cache.steps
        steps.lengths = [context] * batch
        steps.seen = steps.unpadded = context

    rewind()
    if how:
        captured = cache.capture(model, fuse=how == "fused")
        return Steps(captured, rewind, lambda: cache.nbytes)

    def step(ids: Tensor) -> Tensor:
        return model(ids, use_cache=True, **{supported.CACHE: cache}).logits

    return Steps(step, rewind, lambda: cache.nbytes)


MAKERS: dict[str, Callable[..., Steps]] = {
    "dynamic": dynamic, "dynamic flash": dynamic, "static": static, "quantized": quantized,
} | dict.fromkeys(OURS, ours)  # fmt: skip


def time_steps(made: Steps, batch: int, count: int, repeats: int) -> Row:
    """Milliseconds of a step over loops of `count`; the first loop is not counted."""
    on_gpu = torch.cuda.is_available()
    ids = torch.zeros((batch, 1), dtype=torch.long, device="cuda" if on_gpu else "cpu")

    def loop() -> list[float]:
        made.rewind()
        token = ids
        clock = _Clock(on_gpu)
        for _ in range(count):
            token = made.step(token)[:, -1].argmax(dim=-1, keepdim=True)
            clock.mark()
        return clock.times()

    begin = time.perf_counter()
    loop()
    prepared = time.perf_counter() - begin
    loops = [loop() for _ in range(repeats)]
    times = [statistics.mean(steps) for steps in loops]
    return {
        "milliseconds_per_step": statistics.median(times),
        "milliseconds_min": min(times),
        "milliseconds_max": max(times),
        "milliseconds_median": statistics.median(statistics.median(steps) for steps in loops),
        "milliseconds_longest": statistics.median(max(steps) for steps in loops),
        "cache_bytes": made.nbytes(),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "first_loop_seconds": prepared,
    }


def release() -> None:
    """Give memory back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class _Clock:
    """Milliseconds between marks, the first of which is its making; on a GPU by events."""

    def __init__(self, on_gpu: bool):
        self.on_gpu = on_gpu
        self.marks: list[Any] = []
        if on_gpu:
            torch.cuda.synchronize()
        self.mark()

    def mark(self) -> None:
        """Now, in the order of what runs."""
        if not self.on_gpu:
            self.marks.append(time.perf_counter())
            return
        self.marks.append(torch.cuda.Event(enable_timing=True))
        self.marks[-1].record()

    def times(self) -> list[float]:
        """What passed from mark to mark, once all is done."""
        if not self.on_gpu:
            return [1e3 * (b - a) for a, b in pairwise(self.marks)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(self.marks)]


def _graph(forward: Callable[[], Tensor], rewind: Callable[[], None]) -> Callable[[], Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            forward()
    torch.cuda.current_stream().wait_stream(stream)
    rewind()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = forward()
    rewind()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


def _fill(model: Any, cache: Any, batch: int, context: int) -> None:
    """Random keys and values of every layer."""
    config = model.config
    shape = (batch, config.num_key_value_heads, context, config.head_dim)
    for layer in range(config.num_hidden_layers):
        new = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2))
        cache.update(*new, layer)


def _fill_codes(state: State) -> None:
    """Random codes with scales of 1, and random tokens in full precision."""
    for segment in (state.sinks, state.window):
        for rows in (segment.keys, segment.values):
            rows.storage.normal_()
    for part in state.parts:
        for rows in part.pool.rows:
            if rows.storage.dtype == torch.int32:
                rows.storage.fill_(ONE)
                continue
            size = (PATTERN, *rows.storage.shape[1:])
            some = torch.randint(0, 256, size, dtype=torch.uint8, device=state.device)
            whole = rows.storage.shape[0] // PATTERN * PATTERN
            rows.storage[:whole].unflatten(0, (-1, PATTERN)).copy_(some)
            rows.storage[whole:] = some[: rows.storage.shape[0] - whole]
