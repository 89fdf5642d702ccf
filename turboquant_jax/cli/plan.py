"""`turboquant-jax plan`: how many tokens fit a memory beside the weights, compressed and not.

Exact to the byte for what it counts, the weights and every array of the cache; activations, the
compiler's temporaries and what the device keeps for itself are not in it. No device is touched.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

from jax.sharding import AbstractMesh
from rich.console import Console
from rich.table import Table

from turboquant_jax.cache import CacheConfig, CodecConfig
from turboquant_jax.cache.bytes import exact_bytes_per_token
from turboquant_jax.cache.mesh import DATA, TENSOR, abstract_mesh
from turboquant_jax.cli import flags, settings
from turboquant_jax.cli.capacity import MOST_TOKENS, bytes_of_token, cache_bytes, tokens_that_fit
from turboquant_jax.models import rope
from turboquant_jax.models.config import LlamaConfig, parameter_count
from turboquant_jax.models.gguf import open_gguf
from turboquant_jax.models.huggingface_config import config_from_huggingface
from turboquant_jax.models.metadata import read_gguf_config
from turboquant_jax.models.presets import PRESETS
from turboquant_jax.models.sharding import parameters_of_shard, repeated_heads
from turboquant_jax.quantizers.rotation import Kind, default_kind
from turboquant_jax.units import parse_memory


@dataclass(frozen=True)
class Row:
    """One kind of cache: bits are None in full precision, means where heads have their own.

    `tokens` is for each sequence, `cache_bytes` what the caches of all sequences take then,
    `bytes_per_token` what a further token of one sequence takes, and `ratio` says how many times
    the tokens of full precision fit.
    """

    bits_k: float | None
    bits_v: float | None
    tokens: int
    cache_bytes: int
    bytes_per_token: float
    ratio: float | None


@dataclass(frozen=True)
class Plan:
    """What was asked, in bytes and tokens, and a row for each kind of cache.

    On a mesh memory, weights and caches are those of each device.
    """

    model: str
    max_position: int
    memory_bytes: int
    batch: int
    weight_bits: float
    weight_bytes: int
    window: int
    sinks: int
    rotation: Kind
    mesh: dict[str, int] | None
    rows: tuple[Row, ...]


def run(arguments: argparse.Namespace, console: Console) -> dict:
    """Plan and print."""
    kind = settings.calibrated(arguments, read_model(arguments.model))
    result = plan(
        arguments.model,
        arguments.memory,
        arguments.batch,
        settings.with_table(settings.asked_bits(arguments)),
        weight_bits=arguments.weight_bits,
        **settings.segments(arguments),
        allocated=[] if kind is None else [kind.config],
        mesh=None if arguments.mesh is None else abstract_mesh(**flags.mesh(arguments.mesh)),
    )
    show(console, result)
    return asdict(result)


def plan(
    model: str,
    memory: str,
    batch: int,
    pairs: Sequence[tuple[int, int]],
    *,
    window: int,
    sinks: int,
    weight_bits: float = 16,
    rotation: Kind | None = None,
    centring: rope.Centring = "pre_rope",
    allocated: Sequence[CacheConfig] = (),
    mesh: AbstractMesh | None = None,
) -> Plan:
    """Plan for a model and a memory, with a row for full precision and each (key, value) bits.

    Args:
      model: see `read_model`.
      memory: see `units.parse_memory`.
      batch: sequences of the same length.
      pairs: bits of keys and of values, a row each.
      window, sinks, rotation: of the cache, see `CacheConfig`; None is the rotation that
        `rotation.default_kind` has for the head dim.
      weight_bits: bits of a parameter of the model.
      centring: what is subtracted from the keys.
      allocated: caches of heads with bits of their own, a row each.
      mesh: devices, each of which has the memory.

    Raises:
      FileNotFoundError: a model that is no preset and not there.
      ValueError: anything that cannot be, and weights that do not fit.
    """
    config, total = read_model(model), parse_memory(memory)
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if not 0 < weight_bits <= 64:
        raise ValueError(f"weight bits must be above 0 and at most 64, got {weight_bits}")
    if mesh is None:
        parameters = parameter_count(config)
    else:
        parameters = parameters_of_shard(config, mesh)
        config = repeated_heads(config, mesh)
    weights = -int(-Fraction(weight_bits) * parameters // 8)
    if weights >= total:
        raise ValueError(
            f"the weights of {model} take {weights:,} bytes at {weight_bits:g} bits, "
            f"expected less than the memory of {total:,}"
            + ("; a number without a unit is bytes, write 24GB for 24 x 10^9" * memory.isdigit())
        )
    rotation = default_kind(config.head_dim) if rotation is None else rotation
    caches = [
        CacheConfig(
            config.num_layers,
            config.num_kv_heads,
            config.head_dim,
            CodecConfig(key, rotation),
            CodecConfig(value, rotation),
            window=window,
            sinks=sinks,
            sliding_window=config.sliding_window,
            **rope.centring(config, centring),
        )
        for key, value in pairs
    ]
    full = _full_row(caches[0], batch, total - weights, mesh)
    rows = [
        _row(pair, cache, batch, total - weights, full.tokens, mesh)
        for pair, cache in zip(pairs, caches, strict=True)
    ]
    for cache in allocated:
        assert cache.allocation is not None
        means = cache.allocation.means
        rows.insert(0, _row(means, cache, batch, total - weights, full.tokens, mesh))
    return Plan(
        model,
        config.max_position,
        total,
        batch,
        weight_bits,
        weights,
        window,
        sinks,
        rotation,
        None if mesh is None else dict(mesh.shape),
        (full, *rows),
    )


def read_model(model: str) -> LlamaConfig:
    """The config of a preset, of a Hugging Face folder or its `config.json`, or of a GGUF file.

    Raises:
      FileNotFoundError: none of these.
      ValueError: a file that is damaged, or a model that is not served.
    """
    preset = model.lower().removeprefix("random:")
    if model in PRESETS or (preset in PRESETS and not Path(model).exists()):
        return PRESETS[preset]
    path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file, expected a GGUF file, a Hugging Face config.json or its folder,"
            f" or one of {', '.join(PRESETS)}"
        )
    try:
        if path.suffix != ".json":
            return read_gguf_config(open_gguf(path))
        entries = json.loads(path.read_text())
        if not isinstance(entries, dict):
            raise ValueError(f"got a {type(entries).__name__}, expected a JSON object")
        return config_from_huggingface(entries)
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error


def show(console: Console, result: Plan) -> None:
    """Print a plan as a table."""
    table = Table(
        title=f"\n{result.model} in {result.memory_bytes:,} bytes, of which weights at "
        f"{result.weight_bits:g} bits take {result.weight_bytes:,}.\n"
        f"Tokens of each sequence; sequences {result.batch}, sinks {result.sinks}, "
        f"window {result.window}"
        + ("" if result.mesh is None else f"; bytes of each device of {result.mesh}")
        + ("" if result.rotation == "hadamard" else f", {result.rotation} rotation"),
        title_justify="left",
    )
    for column in ("cache", "tokens", "times", "cache bytes", "bytes/token"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    for row in result.rows:
        table.add_row(
            _name(row),
            "any" if row.tokens >= MOST_TOKENS - 1 else f"{row.tokens:,}",
            "" if row.ratio is None else f"{row.ratio:.2f}",
            f"{row.cache_bytes:,}",
            f"{row.bytes_per_token:,.1f}",
        )
    console.print(table)
    console.print(
        "bytes/token: of a further token of one sequence. GB is 10^9 bytes, GiB 2^30.\n"
        "Activations are not counted. "
        f"The model was made for {result.max_position:,} tokens.",
        style="dim",
        highlight=False,
    )


def _full_row(config: CacheConfig, batch: int, budget: int, mesh: AbstractMesh | None) -> Row:
    """Plain 16-bit keys and values, with nothing beside them: of a sliding window, at most it.

    On a mesh heads and sequences are split, a context is not.
    """
    each, most = exact_bytes_per_token(config), MOST_TOKENS
    if mesh is not None:
        each, batch = each // mesh.shape[TENSOR], batch // mesh.shape[DATA]
    fit = budget // (batch * each)
    held = min(fit, most if config.sliding_window is None else config.sliding_window)
    if config.sliding_window is not None and held == config.sliding_window:
        return Row(None, None, most, batch * held * each, 0.0, 1.0)
    return Row(None, None, held, batch * held * each, each, 1.0 if held else None)


def _row(
    bits: tuple[float, float],
    config: CacheConfig,
    batch: int,
    budget: int,
    full_tokens: int,
    mesh: AbstractMesh | None,
) -> Row:
    tokens = tokens_that_fit(config, batch, budget, mesh)
    return Row(
        *bits,
        tokens,
        cache_bytes(config, batch, tokens, mesh) if tokens else 0,
        bytes_of_token(config, mesh),
        tokens / full_tokens if full_tokens else None,
    )


def _name(row: Row) -> str:
    if row.bits_k is None:
        return "16 bits, plain"
    if row.bits_k == row.bits_v:
        return f"{row.bits_k:.3g} bits"
    return f"K {row.bits_k:.3g}, V {row.bits_v:.3g}"
