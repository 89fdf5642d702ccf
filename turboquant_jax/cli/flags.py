"""Flags that several subcommands share."""

import argparse
from pathlib import Path
from typing import get_args

from turboquant_jax import rotation

TABLE_BITS = (8, 4, 3, 2)
MODEL = "GGUF file, Hugging Face folder, or random:PRESET for random weights"


def add_cache(parser: argparse.ArgumentParser, window: int) -> None:
    """Flags of the compressed cache."""
    parser.add_argument("--bits", type=int, default=4, help="bits per channel of the cache")
    parser.add_argument("--bits-k", type=int, help="bits of the keys, if not --bits")
    parser.add_argument("--bits-v", type=int, help="bits of the values, if not --bits")
    add_segments(parser, window)


def add_segments(parser: argparse.ArgumentParser, window: int) -> None:
    """What of the cache stays in full precision, and the rotation of the rest."""
    parser.add_argument(
        "--window", type=int, default=window, help="newest tokens in full precision"
    )
    parser.add_argument("--sinks", type=int, default=4, help="first tokens in full precision")
    parser.add_argument("--rotation", choices=get_args(rotation.Kind), default="hadamard")


def add_json(parser: argparse.ArgumentParser) -> None:
    """The file for the numbers."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")


def asked_bits(arguments: argparse.Namespace) -> tuple[int, int]:
    """Bits of keys and of values."""
    key = arguments.bits if arguments.bits_k is None else arguments.bits_k
    return key, arguments.bits if arguments.bits_v is None else arguments.bits_v


def with_table(asked: tuple[int, int]) -> list[tuple[int, int]]:
    """(key, value) bits of the rows of a table, most first."""
    return sorted({asked, *((b, b) for b in TABLE_BITS)}, key=sum, reverse=True)


def segments(arguments: argparse.Namespace) -> dict:
    """The flags of `add_segments` by name."""
    return {name: getattr(arguments, name) for name in ("window", "sinks", "rotation")}


def name_of_bits(key_bits: int, value_bits: int) -> str:
    """How a cache is called in tables."""
    return f"{key_bits} bits" if key_bits == value_bits else f"K {key_bits}, V {value_bits} bits"


def dtype(name: str | None) -> str:
    """The dtype of weights and computation: bfloat16 on a GPU, float32 elsewhere, or as named."""
    import jax

    return name or ("bfloat16" if jax.default_backend() == "gpu" else "float32")
