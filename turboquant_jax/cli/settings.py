"""What the flags mean to the library: bits, codes, the empty past of a model."""

import argparse
import json
import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
from jax.sharding import Mesh

from turboquant_jax import cache, hosts
from turboquant_jax.cache import (
    Allocation,
    Cache,
    CacheConfig,
    Calibration,
    CodecConfig,
    fitting,
    presets,
    sharding,
)
from turboquant_jax.cache.calibration_file import load_calibration
from turboquant_jax.cache.config import CodecCode, value_code
from turboquant_jax.cache.mesh import make_mesh
from turboquant_jax.cli import choices, flags
from turboquant_jax.models import Llama, LlamaConfig, dense, rope
from turboquant_jax.models.generate import Past
from turboquant_jax.models.identity import require_calibrated
from turboquant_jax.models.past import COMPRESSED, on_mesh
from turboquant_jax.models.sharding import make_past
from turboquant_jax.quantizers.rotation import default_kind

TABLE_BITS = (8, 4, 3, 2)
_ALLOCATION = {"keys", "values", "code"}


def cache_config(
    model: LlamaConfig,
    key_bits: int,
    value_bits: int,
    *,
    centring: rope.Centring = "pre_rope",
    **options,
) -> CacheConfig:
    """The cache of a model; `rotation` and `code` go to both codecs, the rest to the config."""
    codec = {name: options.pop(name) for name in ("rotation", "code", "scales") if name in options}
    key = CodecConfig(key_bits, **codec)
    return CacheConfig(
        model.num_layers,
        model.num_kv_heads,
        model.head_dim,
        key,
        replace(key, bits=value_bits, code=value_code(key.code)),
        sliding_window=model.sliding_window,
        **rope.centring(model, centring),
        **options,
    )


@dataclass(frozen=True)
class Kind:
    """A cache to look at: its name, its config, and a calibration where that asks for one."""

    name: str
    config: CacheConfig
    calibration: Calibration | None = None

    def create(self, capacity: int, seed: int) -> Cache:
        """An empty one, of one sequence."""
        key = jax.random.key(seed)
        return cache.create(self.config, 1, capacity, key=key, calibration=self.calibration)


def asked_bits(arguments: argparse.Namespace) -> tuple[int, int]:
    """Bits of keys and of values."""
    if arguments.preset is not None:
        return preset_bits(arguments.preset)
    given = flags.bits(arguments)
    return given["key"], given["value"]


def preset_bits(name: presets.Preset) -> tuple[int, int]:
    """Bits of keys and of values of a preset."""
    key, value = (codec.bits for codec in presets.codecs(name))
    assert isinstance(key, int) and isinstance(value, int), "presets split no channels"
    return key, value


def allocation(path: Path | None) -> tuple[Allocation, CodecCode] | None:
    """Bits of each layer and their code, out of a file.

    Raises:
      ValueError: something else in it.
    """
    if path is None:
        return None
    try:
        found = json.loads(path.read_text("utf-8-sig"))
        if not isinstance(found, dict) or not {"keys", "values"} <= found.keys() <= _ALLOCATION:
            raise ValueError("expected an object of keys, values and, if it is not scalar, code")
        if not all(isinstance(found[name], list) for name in ("keys", "values")):
            raise ValueError("expected lists of the bits of each layer")
        code = found.get("code", "scalar")
        if code not in get_args(CodecCode):
            raise ValueError(f"code must be one of {', '.join(get_args(CodecCode))}, got {code!r}")
        keys, values = (
            tuple(tuple(bits) if isinstance(bits, list) else bits for bits in found[name])
            for name in ("keys", "values")
        )
        return Allocation(keys, values), code
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def calibrated(
    arguments: argparse.Namespace, config: LlamaConfig, model: Llama | None = None
) -> Kind | None:
    """The cache of a calibration's file; without the model's weights only sizes are compared.

    Raises:
      ValueError: one of another model, or of keys that are centred otherwise; a damaged file.
    """
    path = getattr(arguments, "calibration", None)
    if path is None:
        return None
    known = load_calibration(path)
    require_calibrated(known, config, model)
    assert known.study is not None
    if known.study.centring != arguments.centring:
        raise ValueError(
            f"--centring: got {arguments.centring}, expected {known.study.centring}, which the "
            f"bases of {path} are for"
        )
    options = segments(arguments, config.head_dim) | dict(known.study.codec)
    made = cache_config(config, 4, 4, **options, scale_bits=known.study.scale_bits)
    chosen, name = known.study.allocation, known.study.target
    if arguments.preset is not None:
        text = getattr(arguments, "mesh", None)
        tensor = 1 if text is None else flags.mesh(text).get("tensor", 1)
        chosen = fitting.fit_preset(made, known.study.losses, arguments.preset, tensor)
        name = f"{arguments.preset}'s bytes"
    return Kind(f"calibrated: {name}", replace(made, allocation=chosen), known)


def table(arguments: argparse.Namespace) -> dict[tuple[int, int], CodecCode]:
    """(key, value) bits of the rows of a table and their code: of all presets, if one is asked."""
    if arguments.preset is None:
        return dict.fromkeys(with_table(asked_bits(arguments)), "scalar")
    return {preset_bits(name): presets.codecs(name)[0].code for name in get_args(presets.Preset)}


def code(arguments: argparse.Namespace) -> CodecCode:
    """The code of keys and values: a preset's, scalar otherwise."""
    return "scalar" if arguments.preset is None else presets.codecs(arguments.preset)[0].code


def with_table(asked: tuple[int, int]) -> list[tuple[int, int]]:
    """(key, value) bits of the rows of a table, most first."""
    return sorted({asked, *((b, b) for b in TABLE_BITS)}, key=sum, reverse=True)


def segments(arguments: argparse.Namespace, head_dim: int | None = None) -> dict[str, Any]:
    """Window, sinks, centring and rotation: as asked for, or what serves the head dim."""
    usual, name = arguments.usual_window, arguments.preset
    if name is not None:
        usual = presets.window(name, getattr(arguments, "calibration", None) is not None)
    default = None if head_dim is None else default_kind(head_dim)
    return {
        "window": getattr(arguments, "window", usual),
        "sinks": arguments.sinks,
        "rotation": arguments.rotation or default,
        "centring": arguments.centring,
    }


def name_of_bits(key_bits: int, value_bits: int) -> str:
    """How a cache is called in tables."""
    return f"{key_bits} bits" if key_bits == value_bits else f"K {key_bits}, V {value_bits} bits"


def dtype(name: str | None) -> str:
    """The dtype of weights and computation: bfloat16 on a GPU, float32 elsewhere, or as named."""
    default = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    return default if name is None else choices.dtype(name)


def join_hosts(arguments: argparse.Namespace) -> None:
    """Start with the other hosts that the environment names, if a mesh was asked for.

    Only the first one prints. To be called before anything that asks JAX for its devices.

    Raises:
      TimeoutError: hosts that do not come.
      ValueError: sequences that are split over hosts.
    """
    if arguments.mesh is None or not hosts.start():
        return
    if flags.mesh(arguments.mesh).get("data", 1) > 1:
        raise ValueError("--mesh: got data on several hosts, expected a command for each host")
    if jax.process_index():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def mesh(arguments: argparse.Namespace) -> Mesh | None:
    """The devices that were asked for, None for the one that is usual.

    Raises:
      ValueError: more than there are.
    """
    text = getattr(arguments, "mesh", None)
    return None if text is None else make_mesh(**flags.mesh(text))


def is_dense(arguments: argparse.Namespace) -> bool:
    """Whether the cache in full precision was asked for."""
    full = (choices.FULL, choices.FULL)
    given = (arguments.allocation, arguments.calibration)
    return given == (None, None) and asked_bits(arguments) == full


def empty_past(
    arguments: argparse.Namespace,
    config: LlamaConfig,
    batch: int,
    capacity: int,
    model: Llama | None = None,
) -> tuple[Any, Past]:
    """An empty past of the kind that the flags ask for, and how it is used.

    A calibration is held against the weights of the `model`.

    Raises:
      ValueError: bits of another number of layers, or a calibration of another model.
    """
    known, devices = None, mesh(arguments)
    if is_dense(arguments):
        make = partial(dense.create, config, batch, capacity, dtype(arguments.dtype))
        past = dense.DENSE if devices is None else dense.on_mesh(devices)
        return make_past(make, devices), past
    key, options = jax.random.key(arguments.seed), segments(arguments, config.head_dim)
    found, kind = allocation(arguments.allocation), calibrated(arguments, config, model)
    if kind is not None:
        compressed, known = kind.config, kind.calibration
    elif found is not None:
        layers, code_of = found
        compressed = cache_config(config, 4, 4, code=code_of, allocation=layers, **options)
    else:
        compressed = cache_config(config, *asked_bits(arguments), code=code(arguments), **options)
    if devices is not None:
        state = sharding.create(devices, compressed, batch, capacity, key=key, calibration=known)
        return state, on_mesh(devices)
    return cache.create(compressed, batch, capacity, key=key, calibration=known), COMPRESSED
