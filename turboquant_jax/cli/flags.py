"""Flags that several subcommands share, and what is wrong with them, known without JAX."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from pallas_kernels.primitives.limits import MAX_QUERIES
from turboquant_jax.cli import choices

AXES = "data", "tensor", "context"
MODEL = "GGUF file, Hugging Face folder, or random:PRESET for random weights"


def add_model(parser: argparse.ArgumentParser) -> None:
    """The checkpoint."""
    parser.add_argument("--model", help=f"{MODEL} (default: SmolLM2-135M)")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """That of weights and computation."""
    parser.add_argument(
        "--dtype",
        help=f"of weights: {' or '.join(choices.DTYPES)} (bfloat16 on a GPU, else float32)",
    )


def add_cache(parser: argparse.ArgumentParser, window: int) -> None:
    """Flags of the compressed cache."""
    add_preset(parser)
    parser.add_argument(
        "--bits",
        type=int,
        default=argparse.SUPPRESS,
        help="bits per channel of the cache (default: 4)",
    )
    for flag, side in (("--bits-k", "keys"), ("--bits-v", "values")):
        parser.add_argument(
            flag, type=int, help=f"bits of the {side}, if not --bits; 16: in full precision"
        )
    add_segments(parser, window)


def add_preset(parser: argparse.ArgumentParser) -> None:
    """A named cache."""
    parser.add_argument(
        "--preset", choices=choices.PRESETS, help="bits and code by name, instead of bits"
    )


def add_allocation(parser: argparse.ArgumentParser) -> None:
    """Bits of each layer."""
    parser.add_argument(
        "--allocation",
        type=Path,
        metavar="FILE",
        help='bits of each layer, instead of bits: {"keys": [4, 3, ...], "values": [3, 2, ...], '
        '"code": "trellis"}; the code is scalar unless given; "prod" is one of keys',
    )


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Formats of each head."""
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="formats of each head and their bases, instead of bits: what `calibrate` wrote; with "
        "--preset those of least loss in its bytes",
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
    parser.add_argument(
        "--rotation",
        choices=choices.ROTATIONS,
        help="(default: hadamard, or haar for a head dim that is no power of two)",
    )
    parser.add_argument(
        "--centring",
        choices=choices.CENTRINGS,
        default="pre_rope",
        help="the mean that is subtracted from keys: before RoPE, as stored, or none "
        "(default: %(default)s)",
    )


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """Several devices."""
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help=f"devices: {', '.join(AXES)}, such as tensor=2,context=2 (default: one device)",
    )


def mesh(text: str) -> dict[str, int]:
    """Sizes of the axes of a mesh.

    Raises:
      ValueError: an axis that there is not, or a size that is no positive integer.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, number = part.partition("=")
        if axis not in AXES or axis in sizes or not number.isdecimal() or int(number) < 1:
            expected = f"expected {', '.join(AXES)} once each, and a positive number"
            raise ValueError(f"--mesh: got {part!r}, {expected}, such as tensor=2")
        sizes[axis] = int(number)
    return sizes


def add_json(parser: argparse.ArgumentParser) -> None:
    """The file for the numbers."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")


def add_speculation(parser: argparse.ArgumentParser) -> None:
    """Drafts, which make an answer take fewer passes."""
    parser.add_argument(
        "--speculate",
        metavar="WAY[:K]",
        help=f"draft K tokens a pass (default: {choices.DRAFTED}) and keep those that the model "
        f"agrees with: {choices.NGRAM} copies what followed the same words before, "
        f"{choices.MODEL} is --draft",
    )
    parser.add_argument(
        "--draft", metavar="MODEL", help="a smaller model with the same tokens, which drafts"
    )


def drafts(arguments: argparse.Namespace) -> tuple[str, int] | None:
    """The way of drafts and their tokens, or None without them.

    Raises:
      ValueError: another way, a number that no draft has, or flags that do not go together.
    """
    if arguments.speculate is None and arguments.draft is None:
        return None
    way, _, number = (arguments.speculate or choices.MODEL).partition(":")
    if way not in (choices.NGRAM, choices.MODEL):
        expected = f"expected {choices.NGRAM} or {choices.MODEL}, and :K for its tokens"
        raise ValueError(f"--speculate: got {arguments.speculate}, {expected}")
    most = MAX_QUERIES - 1  # and the token before the draft
    if number and not (number.isdecimal() and 1 <= int(number) <= most):
        raise ValueError(f"--speculate: got {number} tokens of a draft, expected 1 to {most}")
    if (way == choices.MODEL) != (arguments.draft is not None):
        beside = "nothing" if arguments.draft is None else "--draft"
        raise ValueError(f"--speculate {way}: got {beside} beside it, expected --draft for model")
    for name in ("stream", "stop"):
        if getattr(arguments, name):
            raise ValueError(f"drafts are for whole answers, got --{name} beside them")
    return way, int(number or choices.DRAFTED)


def add_compile_cache(parser: argparse.ArgumentParser) -> None:
    """Where compiled programs are kept."""
    parser.add_argument(
        "--compile-cache",
        metavar="DIR",
        help="keep compiled programs here for the next run, or off (default: "
        "$TURBOQUANT_JAX_COMPILE_CACHE, $JAX_COMPILATION_CACHE_DIR, ~/.cache/turboquant-jax)",
    )


def check_at_least(arguments: argparse.Namespace, least: int, *names: str) -> None:
    """ValueError for one of these flags, or one of its values, below `least`."""
    for name in names:
        value = getattr(arguments, name)
        for one in value if isinstance(value, list) else [value]:
            if one < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {one}")


def check_cache(arguments: argparse.Namespace, *, full: bool = False) -> None:
    """What is wrong with the flags of a cache; `full` allows 16 bits of both keys and values.

    Raises:
      FileNotFoundError: no such allocation or calibration.
      ValueError: bits, a window or sinks that cannot be, and two flags that both say the bits.
    """
    check_segments(arguments)
    given = bits(arguments)
    coded = {name: value for name, value in given.items() if value != choices.FULL}
    if not coded and not full:
        raise ValueError(
            f"key.bits and value.bits: got {choices.FULL} and {choices.FULL}, expected one of them "
            "coded"
        )
    for name, value in coded.items():
        check_bits(f"{name}.bits", [value])


def check_segments(arguments: argparse.Namespace) -> None:
    """Of `check_cache`, what has to do with window and sinks, and with what says the bits."""
    for name in ("window", "sinks"):
        if getattr(arguments, name, 0) < 0:
            raise ValueError(f"{name}: got {getattr(arguments, name)}, expected at least 0")
    files = {"allocation": "bits of each layer", "calibration": "what `calibrate` wrote"}
    given = {name: getattr(arguments, name, None) for name in files}
    if all(given.values()):
        raise ValueError("--calibration says the bits, got --allocation beside it")
    for name, path in given.items():
        if path is None:
            continue
        if arguments.preset is not None and name == "allocation":
            raise ValueError(f"--{name} {path} says the bits, got --preset beside it")
        _refuse_bits(arguments, f"--{name} {path}")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, expected {files[name]}")
    if arguments.preset is not None:
        _refuse_bits(arguments, f"--preset {arguments.preset}")


def check_bits(name: str, values: Iterable[int]) -> None:
    """ValueError for bits that no quantizer has."""
    for value in values:
        if not 1 <= value <= 8:
            raise ValueError(f"{name}: got {value}, expected between 1 and 8")


def bits(arguments: argparse.Namespace) -> dict[str, int]:
    """The bits of keys and values that the flags say, a preset aside."""
    both = getattr(arguments, "bits", 4)
    own = {"key": arguments.bits_k, "value": arguments.bits_v}
    return {name: both if one is None else one for name, one in own.items()}


def _refuse_bits(arguments: argparse.Namespace, instead: str) -> None:
    names = ("bits", "bits_k", "bits_v")
    given = [name for name in names if getattr(arguments, name, None) is not None]
    if given:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{instead} says the bits, got {flags} beside it")


def check_folder(path: Path | None) -> None:
    """FileNotFoundError for a file that no folder is there for."""
    if path is not None and not path.resolve().parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder, expected one for {path.name}")
