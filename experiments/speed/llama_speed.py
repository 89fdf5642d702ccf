"""A whole decoder at full size: tokens per second, and tokens that fit.

Random weights of Llama-3-8B in bfloat16, as good as weights with the rotation of the values inside
(`folding`), greedy decoding in one compiled loop. The baseline is the same decoder with a dense
bfloat16 past and cuDNN's attention, in the same run. Pasts are filled with random codes at full
length. `largest` is the largest batch at its context that fits the memory, `longest` the longest
single sequence; both are really allocated and decoded. A step of the roofline reads the weights and
the past once, as fast as a copy of a gibibyte runs; `ratio_to_baseline` is of tokens per second.

Keys are centred by their mean before RoPE, the default. `stored` is a run from before that, with
the mean of stored keys.
"""

import contextlib
import dataclasses
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax

from experiments.harness.experiment import Row, Track, option, where
from experiments.harness.journal import open_journal
from experiments.speed import greedy_generation, llama_claims, llama_figure, llama_sizes
from experiments.speed.device_time import copy_bandwidth
from turboquant_jax.cache import CacheConfig, CodecConfig
from turboquant_jax.models import PRESETS, Llama, LlamaConfig, timing
from turboquant_jax.models.dense import DENSE
from turboquant_jax.models.generate import Past
from turboquant_jax.models.model import random_model
from turboquant_jax.models.past import COMPRESSED
from turboquant_jax.models.rope import centring

FULL = 16
_SIZED = (FULL, 4, 2)  # bits of the cases that fill the memory, of which one loop is timed
_SHARES = (0.99, 0.97, 0.93, 0.85, 0.6)  # of the free memory, one after another until one fits
_COMPILERS = 8
_REFUSED = NotImplementedError, jax.errors.JaxRuntimeError  # by a kernel, or for lack of memory


NEEDS = "an NVIDIA GPU of 80 GB for its full size"
KEYS = ("case", "model", "bits_k", "bits_v", "context", "dtype")


@dataclass(frozen=True)
class Config:
    """What to run."""

    cases: tuple[str, ...] = option(
        ("32x4096", "8x32768", "1x4096", "largest4096", "longest"),
        "batch x context, largest<context>, longest, greedy",
    )
    bits: tuple[int, ...] = option((FULL, 4, 2, 3), "bits of keys and values; 16: the baseline")
    model: str = option("llama-3-8b", "preset whose sizes the random weights have")
    layers: int = option(0, "layers instead of the preset's, if not 0")
    steps: int = option(64, "steps of a compiled loop, a whole number of blocks")
    repeats: int = option(3, "timed loops; their median counts")
    checkpoint: str = option(
        "", "GGUF file for the case greedy, if not the packaged SmolLM2", path=True
    )
    tokens: int = option(256, "tokens of the case greedy")
    seconds: float = option(0.0, "start no case after so long, 0 for never")


SMOKE = Config(("2x100",), (FULL, 4), "smollm2-135m", 1, 4, 1)


def run(config: Config, track: Track) -> Iterator[Row]:
    """Measure every case, what a journal holds of this device's memory only once."""
    journal, bench = open_journal("llama_speed", config, ("cases", "bits")), Bench(config)
    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    rows: list[Row] = []
    for case in config.cases:
        names = {bits: f"{case} {bits} bits in {memory} bytes" for bits in _jobs(config, case)}
        if journal.has_time():
            bench.compile(case, [bits for bits, name in names.items() if name not in journal.held])
        for bits in track(list(names), f"llama_speed {case}"):
            measure = functools.partial(bench.measure, case, bits, rows)
            fresh = journal.measure(names[bits], measure)
            rows += fresh
            yield from fresh


def _jobs(config: Config, case: str) -> list[int]:
    """The bits at which a case is measured, the baseline first."""

    def asked(bits: int) -> bool:
        return bits == 4 if case == "greedy" else bits in _SIZED or not llama_sizes.fills(case)

    return sorted(filter(asked, config.bits), key=lambda bits: bits != FULL)


class Bench:
    """Holds the decoder on the device, and measures one case at a time."""

    def __init__(self, config: Config):
        self.config = config
        preset = PRESETS[config.model]
        layers = config.layers or preset.num_layers
        self.llama: LlamaConfig = dataclasses.replace(preset, num_layers=layers)
        self.compiled: dict[tuple[int, int, int], timing.CompiledDecode] = {}

    @functools.cached_property
    def copy(self) -> float:
        """Bytes per second of a copy on this device."""
        return copy_bandwidth() if jax.default_backend() == "gpu" else timing.copy_bandwidth(2**26)

    @functools.cached_property
    def model(self) -> Llama:
        """The decoder."""
        return jax.block_until_ready(random_model(self.llama, 0, stacked=False))

    def cache_config(self, bits: int) -> CacheConfig:
        """The default cache, values rotated already."""
        codecs = CodecConfig(bits), CodecConfig(bits, rotation="identity")
        sizes = self.llama.num_layers, self.llama.num_kv_heads, self.llama.head_dim
        window, means = self.llama.sliding_window, centring(self.llama)
        return CacheConfig(*sizes, *codecs, sliding_window=window, **means)

    def compile(self, case: str, every: Sequence[int]) -> None:
        """Compile the loops of a case ahead.

        The first of every batch alone, because XLA times its matrix products while it compiles,
        once for each shape.
        """
        if case == "greedy" or not every:
            return
        self.compiled.clear()
        one = functools.partial(self.compile_one, case)
        one(every[0])
        with ThreadPoolExecutor(1 if case.startswith("largest") else _COMPILERS) as pool:
            list(pool.map(one, every[1:]))

    def compile_one(self, case: str, bits: int) -> None:
        """Compile one loop of a case ahead."""
        key = bits, *self._size(case, bits, _SHARES[0])
        call = self.model, *self._past(*key), self.config.steps
        with contextlib.suppress(*_REFUSED):  # and said when it is measured
            self.compiled[key] = timing.compile_decode(*call)

    def measure(self, case: str, bits: int, rows: Sequence[Row]) -> list[Row]:
        """The rows of a case; none where it does not fit the device."""
        if case == "greedy":
            compare = functools.partial(
                greedy_generation.compare, self.config.checkpoint, self.config.tokens
            )
            with ThreadPoolExecutor() as pool:
                return [{"case": case} | r for r in pool.map(compare, ("float32", "bfloat16"))]
        for share in _SHARES if llama_sizes.fills(case) else (1.0,):
            row = self._tried(case, bits, *self._size(case, bits, share))
            if row is None:
                gc.collect()
                continue
            base = where(rows, case=case, bits_k=FULL)
            if base and case != "longest":
                row["ratio_to_baseline"] = row["tokens_per_second"] / base[0]["tokens_per_second"]
            return [row]
        return []

    def _tried(self, case: str, bits: int, batch: int, context: int) -> Row | None:
        """The row, or None where the device has too little memory, or a kernel refuses the size."""
        try:
            # a past that does not fit is no reason to compile
            if llama_sizes.fills(case) and (bits, batch, context) not in self.compiled:
                jax.block_until_ready(self._past(bits, batch, context)[0]())
                gc.collect()
            return self._decode(case, bits, batch, context)
        except NotImplementedError as error:
            reason = str(error)
        except jax.errors.JaxRuntimeError as error:
            reason = str(error)
            if "RESOURCE_EXHAUSTED" not in reason:
                raise
        print(f"{case} at {bits} bits, {batch} x {context}: {reason[:200]}", flush=True)
        return None

    def _size(self, case: str, bits: int, share: float) -> tuple[int, int]:
        cache = None if bits == FULL else self.cache_config(bits)
        free = int(share * self.free) if llama_sizes.fills(case) else 0
        return llama_sizes.size(case, self.cache_config(4), cache, self.config.steps + 1, free)

    @functools.cached_property
    def free(self) -> int:
        """Bytes beside the decoder."""
        jax.block_until_ready(self.model)
        stats = jax.devices()[0].memory_stats()
        if stats is None:
            raise ValueError("got a device that does not report its memory, expected a GPU")
        return stats["bytes_limit"] - stats["bytes_in_use"]

    def _past(self, bits: int, batch: int, context: int) -> tuple[Callable[[], Any], Past[Any]]:
        """What makes a filled past, and how it is used."""
        capacity = context + self.config.steps + 1
        sizes = batch, context, capacity
        if bits == FULL:
            return functools.partial(timing.filled_dense, self.llama, *sizes), DENSE
        cache = self.cache_config(bits)
        return functools.partial(timing.filled_cache, cache, *sizes), COMPRESSED

    def _decode(self, case: str, bits: int, batch: int, context: int) -> Row:
        model, cache = self.model, self.cache_config(4 if bits == FULL else bits)
        make, past = self._past(bits, batch, context)
        shapes = jax.tree.leaves(jax.eval_shape(make))
        nbytes = sum(x.size * x.dtype.itemsize for x in shapes)
        timed = timing.time_decode(
            model, make, past,
            steps=self.config.steps,
            repeats=1 if llama_sizes.fills(case) else self.config.repeats,
            compiled=self.compiled.get((bits, batch, context)),
        )  # fmt: skip
        middle = context + self.config.steps / 2
        read = batch * timing.past_bytes(cache, middle, bits != FULL)
        fastest = (timing.weight_bytes(model) + read) / self.copy
        stats = jax.devices()[0].memory_stats() or {}
        return {
            "case": case,
            "model": self.config.model,
            "cache": "bf16" if bits == FULL else f"{bits} bits",
            "bits_k": bits,
            "bits_v": bits,
            "batch": batch,
            "context": context,
            "milliseconds_per_step": timed.median * 1e3,
            "milliseconds_min": min(timed.seconds) * 1e3,
            "milliseconds_max": max(timed.seconds) * 1e3,
            "tokens_per_second": batch / timed.median,
            "fraction_of_roofline": fastest / timed.median,
            "copy_gigabytes_per_second": self.copy / 1e9,
            "weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model)),
            "cache_bytes": nbytes,
            "temporary_bytes": timed.temporary_bytes,
            "peak_bytes": stats.get("peak_bytes_in_use", 0),
            "memory_limit": stats.get("bytes_limit", 0),
            "compile_seconds": timed.compile_seconds,
        }


claims, figure = llama_claims.claims, llama_figure.figure
