"""Decoding and prefill over a grid of batches and contexts, full precision beside compressed."""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from turboquant_jax import cache
from turboquant_jax.cache import Allocation, CacheConfig, Calibration, CodecConfig, sharding
from turboquant_jax.cache.config import CodecCode, Scales, value_code
from turboquant_jax.models import Llama, dense, rope, timing
from turboquant_jax.models.generate import Past
from turboquant_jax.models.past import COMPRESSED, on_mesh
from turboquant_jax.models.sharding import make_past

FULL = 16
Bits = tuple[int, int] | Allocation


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
      phase: "decode", of one step after `context` tokens, or "prefill", of `context` tokens.
      bits_k, bits_v: of the cache, the mean where each layer has its own; 16 is the dense past in
        full precision.
      batch, context: sequences, and tokens of each.
      milliseconds: of a step, or of the whole prompt; the median over repetitions.
      tokens_per_second: of all sequences.
      ratio: of tokens per second to full precision; None where that was not measured.
      fraction_of_roofline: the time in which a copy moves as many bytes as weights and cache have,
        over the time taken; None for prefill, which is bound by arithmetic.
      cache_bytes: of the past as allocated.
    """

    phase: str
    bits_k: float
    bits_v: float
    batch: int
    context: int
    milliseconds: float
    tokens_per_second: float
    ratio: float | None
    fraction_of_roofline: float | None
    cache_bytes: int


@dataclass(frozen=True)
class Grid:
    """What to measure, and how thoroughly.

    Attributes:
      bits: (keys, values), or those of each layer; (16, 16), full precision, first if the others
        are to be held against it.
      batches, contexts: every pair of them.
      steps, repeats: steps of a timed loop, and how many loops.
      chunk: tokens of a forward pass of prefill.
      window, sinks, rotation, code: of the cache, see `CacheConfig`.
      centring: what is subtracted from the keys.
      scales, calibration: of groups of channels in an allocation, and the bases that they are in.
      mesh: several devices, on which the decoder is.
    """

    bits: Sequence[Bits]
    batches: Sequence[int]
    contexts: Sequence[int]
    steps: int = 64
    repeats: int = 3
    chunk: int = 512
    window: int = 128
    sinks: int = 4
    rotation: Any = "hadamard"
    code: CodecCode = "scalar"
    centring: rope.Centring = "pre_rope"
    scales: Scales = "group"
    calibration: Calibration | None = None
    mesh: Mesh | None = None

    def __post_init__(self):
        for name in ("batches", "contexts", "steps", "repeats", "chunk"):
            value = getattr(self, name)
            if min(value if isinstance(value, Sequence) else (value,)) < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")

    @property
    def size(self) -> int:
        """How many rows it makes."""
        return 2 * len(self.bits) * len(self.batches) * len(self.contexts)


def measure(
    model: Llama, grid: Grid, bandwidth: float, progress: Callable[[str], None]
) -> Iterator[Row]:
    """Rows of the grid, for an unstacked decoder; `progress` hears what is about to be measured.

    `bandwidth` is that of a copy in bytes a second (`timing.copy_bandwidth`).
    """
    base: dict[tuple, float] = {}
    for batch in grid.batches:
        for context in grid.contexts:
            for bits in grid.bits:
                for phase, time in (("decode", _decode), ("prefill", _prefill)):
                    progress(f"{phase} {batch} x {context:,}: {name(*_mean(bits))}")
                    row = time(model, grid, bits, batch, context, bandwidth)
                    case = phase, batch, context
                    if bits == (FULL, FULL):
                        base[case] = row.tokens_per_second
                    ratio = row.tokens_per_second / base[case] if case in base else None
                    yield Row(**(asdict(row) | {"ratio": ratio}))


def name(bits_k: float, bits_v: float) -> str:
    """How a cache is called in tables and plots."""
    return f"{bits_k:.3g} bits" if bits_k == bits_v else f"K {bits_k:.3g}, V {bits_v:.3g} bits"


def _mean(bits: Bits) -> tuple[float, float]:
    """Bits of keys and of values, the mean over the layers where each has its own."""
    if isinstance(bits, Allocation):
        return bits.means
    return bits


def _decode(model: Llama, grid: Grid, bits: Bits, batch: int, context: int, bandwidth: float):
    config, full = _config(model, grid, bits), bits == (FULL, FULL)
    sizes = batch, context, context + grid.steps + 1
    make: Callable[[], Any]
    if full:
        make = partial(make_past, partial(timing.filled_dense, model.config, *sizes), grid.mesh)
    else:
        known = grid.calibration if isinstance(bits, Allocation) else None
        make = partial(timing.filled_cache, config, *sizes, calibration=known, mesh=grid.mesh)
    timed = timing.time_decode(
        model, make, _past(grid, full), steps=grid.steps, repeats=grid.repeats, mesh=grid.mesh
    )
    read = timing.past_bytes(config, context + grid.steps / 2, not full) * batch
    devices = 1 if grid.mesh is None else grid.mesh.size
    ideal = (timing.weight_bytes(model) + read / devices) / bandwidth
    return _row("decode", bits, batch, context, timed.median, batch, ideal / timed.median, make)


def _prefill(model: Llama, grid: Grid, bits: Bits, batch: int, context: int, bandwidth: float):
    full = bits == (FULL, FULL)

    def make() -> Any:
        if full:
            return make_past(partial(dense.create, model.config, batch, context), grid.mesh)
        options: dict[str, Any] = dict(key=jax.random.key(0))
        options["calibration"] = grid.calibration if isinstance(bits, Allocation) else None
        sizes = _config(model, grid, bits), batch, context
        if grid.mesh is None:
            return cache.create(*sizes, **options)
        return sharding.create(grid.mesh, *sizes, **options)

    chunk = min(grid.chunk, context)
    timed = timing.time_prefill(
        model, make, batch, context, _past(grid, full), chunk=chunk, repeats=grid.repeats
    )
    return _row("prefill", bits, batch, context, timed.median, batch * context, None, make)


def _past(grid: Grid, full: bool) -> Past[Any]:
    """How the decoder uses its past."""
    if grid.mesh is None:
        return dense.DENSE if full else COMPRESSED
    return dense.on_mesh(grid.mesh) if full else on_mesh(grid.mesh)


def _row(
    phase: str, bits: Bits, batch: int, context: int, seconds: float, tokens: int, share, make
):
    each = tokens / seconds
    return Row(phase, *_mean(bits), batch, context, seconds * 1e3, each, None, share, _nbytes(make))


def _config(model: Llama, grid: Grid, bits: Bits) -> CacheConfig:
    """Of full precision only the sizes are used; bits of each layer are the allocation's."""
    sizes = model.config.num_layers, model.config.num_kv_heads, model.config.head_dim
    allocation = bits if isinstance(bits, Allocation) else None
    pair = (4, 4) if isinstance(bits, Allocation) or bits == (FULL, FULL) else bits
    codes = grid.code, value_code(grid.code)
    scales: Scales = "group" if allocation is None else grid.scales
    key, value = (
        CodecConfig(b, grid.rotation, code=c, scales=scales)
        for b, c in zip(pair, codes, strict=True)
    )
    return CacheConfig(
        *sizes,
        key,
        value,
        window=grid.window,
        sinks=grid.sinks,
        allocation=allocation,
        sliding_window=model.config.sliding_window,
        **rope.centring(model.config, grid.centring),
    )


def _nbytes(make: Callable[[], Any]) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(make)))


def to_csv(rows: Sequence[Row]) -> str:
    """A line for each row under the names of its fields; None is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def require_plotting() -> None:
    """ValueError without matplotlib, which is an extra."""
    if find_spec("matplotlib") is None:
        raise ValueError("a plot needs matplotlib: pip install 'turboquant-jax[experiments]'")


def plot(rows: Sequence[Row], path: Path) -> None:
    """Tokens per second over context: a panel for each phase, a line for each cache and batch."""
    require_plotting()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, phase in zip(figure.subplots(1, 2), ("decode", "prefill"), strict=True):
        found = [row for row in rows if row.phase == phase]
        for line in dict.fromkeys((row.bits_k, row.bits_v, row.batch) for row in found):
            points = [r for r in found if (r.bits_k, r.bits_v, r.batch) == line]
            axis.plot(
                [r.context for r in points], [r.tokens_per_second for r in points], marker="o",
                label=f"{name(*line[:2])}, batch {line[2]}",
            )  # fmt: skip
        axis.set(title=phase, xlabel="context, tokens", ylabel="tokens / s", xscale="log")
        axis.legend(fontsize=7, frameon=False)
    figure.savefig(path)
