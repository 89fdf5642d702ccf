"""Flags that several subcommands share."""

import argparse
import json
from pathlib import Path
from typing import get_args

from turboquant_jax import rotation
from turboquant_jax.cache import Allocation, presets
from turboquant_jax.quantizer import Code

TABLE_BITS = (8, 4, 3, 2)
_ALLOCATION = {"keys", "values", "code"}
MODEL = "GGUF file, Hugging Face folder, or random:PRESET for random weights"


def add_cache(parser: argparse.ArgumentParser, window: int) -> None:
    """Flags of the compressed cache."""
    add_preset(parser)
    parser.add_argument(
        "--bits",
        type=int,
        default=argparse.SUPPRESS,
        help="bits per channel of the cache (default: 4)",
    )
    parser.add_argument("--bits-k", type=int, help="bits of the keys, if not --bits")
    parser.add_argument("--bits-v", type=int, help="bits of the values, if not --bits")
    add_segments(parser, window)


def add_preset(parser: argparse.ArgumentParser) -> None:
    """A named cache."""
    parser.add_argument(
        "--preset", choices=get_args(presets.Preset), help="bits and code by name, instead of bits"
    )


def add_allocation(parser: argparse.ArgumentParser) -> None:
    """Bits of each layer."""
    parser.add_argument(
        "--allocation",
        type=Path,
        metavar="FILE",
        help='bits of each layer, instead of bits: {"keys": [4, 3, ...], "values": [3, 2, ...], '
        '"code": "trellis"}; the code is scalar unless given',
    )


def add_segments(parser: argparse.ArgumentParser, window: int) -> None:
    """What of the cache stays in full precision, and the rotation of the rest."""
    parser.set_defaults(usual_window=window)
    parser.add_argument(
        "--window",
        type=int,
        default=argparse.SUPPRESS,
        help=f"newest tokens in full precision (default: {window})",
    )
    parser.add_argument("--sinks", type=int, default=4, help="first tokens in full precision")
    parser.add_argument("--rotation", choices=get_args(rotation.Kind), default="hadamard")


def add_json(parser: argparse.ArgumentParser) -> None:
    """The file for the numbers."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")


def asked_bits(arguments: argparse.Namespace) -> tuple[int, int]:
    """Bits of keys and of values.

    Raises:
      ValueError: a preset, and bits beside it.
    """
    if arguments.preset is not None:
        refuse_bits(arguments)
        return preset_bits(arguments.preset)
    bits = getattr(arguments, "bits", 4)
    key = bits if arguments.bits_k is None else arguments.bits_k
    return key, bits if arguments.bits_v is None else arguments.bits_v


def refuse_bits(arguments: argparse.Namespace) -> None:
    """ValueError where a preset and bits are given."""
    _refuse(arguments, f"--preset {arguments.preset}")


def _refuse(arguments: argparse.Namespace, instead: str) -> None:
    given = [n for n in ("bits", "bits_k", "bits_v") if getattr(arguments, n, None) is not None]
    if given:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{instead} says the bits, got {names} beside it")


def preset_bits(name: presets.Preset) -> tuple[int, int]:
    """Bits of keys and of values of a preset."""
    key, value = (codec.bits for codec in presets.codecs(name))
    assert isinstance(key, int) and isinstance(value, int), "presets split no channels"
    return key, value


def allocation(arguments: argparse.Namespace) -> tuple[Allocation, Code] | None:
    """Bits of each layer and their code, out of a file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: something else in it, and a preset or bits beside it.
    """
    path = arguments.allocation
    if path is None:
        return None
    if arguments.preset is not None:
        raise ValueError(f"--allocation {path} says the bits, got --preset beside it")
    _refuse(arguments, f"--allocation {path}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected bits of each layer")
    try:
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict) or not {"keys", "values"} <= found.keys() <= _ALLOCATION:
            raise ValueError("expected an object of keys, values and, if it is not scalar, code")
        if not all(isinstance(found[name], list) for name in ("keys", "values")):
            raise ValueError("expected lists of the bits of each layer")
        code = found.get("code", "scalar")
        if code not in get_args(Code):
            raise ValueError(f"code must be one of {', '.join(get_args(Code))}, got {code!r}")
        return Allocation(tuple(found["keys"]), tuple(found["values"])), code
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def table(arguments: argparse.Namespace) -> dict[tuple[int, int], Code]:
    """(key, value) bits of the rows of a table and their code: of all presets, if one is asked."""
    if arguments.preset is None:
        return dict.fromkeys(with_table(asked_bits(arguments)), "scalar")
    return {preset_bits(name): presets.codecs(name)[0].code for name in get_args(presets.Preset)}


def code(arguments: argparse.Namespace) -> Code:
    """The code of keys and values: a preset's, scalar otherwise."""
    return "scalar" if arguments.preset is None else presets.codecs(arguments.preset)[0].code


def with_table(asked: tuple[int, int]) -> list[tuple[int, int]]:
    """(key, value) bits of the rows of a table, most first."""
    return sorted({asked, *((b, b) for b in TABLE_BITS)}, key=sum, reverse=True)


def segments(arguments: argparse.Namespace) -> dict:
    """The flags of `add_segments` by name."""
    usual = arguments.usual_window if arguments.preset is None else presets.WINDOW
    found = {name: getattr(arguments, name) for name in ("sinks", "rotation")}
    return {"window": getattr(arguments, "window", usual), **found}


def name_of_bits(key_bits: int, value_bits: int) -> str:
    """How a cache is called in tables."""
    return f"{key_bits} bits" if key_bits == value_bits else f"K {key_bits}, V {value_bits} bits"


def dtype(name: str | None) -> str:
    """The dtype of weights and computation: bfloat16 on a GPU, float32 elsewhere, or as named."""
    import jax

    return name or ("bfloat16" if jax.default_backend() == "gpu" else "float32")
