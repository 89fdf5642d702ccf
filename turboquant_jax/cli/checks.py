"""What is wrong with a subcommand's arguments, found before anything heavy is imported.

Raises ValueError or FileNotFoundError with one line, as the library does for what it finds later.
"""

import argparse
import math

from turboquant_jax.cli import choices, flags, models, texts
from turboquant_jax.models.options import Sampling
from turboquant_jax.units import parse_memory


def demo(arguments: argparse.Namespace) -> None:
    """Of `demo`."""
    flags.check_at_least(arguments, 2, "tokens", "context")
    if arguments.text is not None and not arguments.text.is_file():
        raise FileNotFoundError(f"{arguments.text}: no such file, expected a text")
    flags.check_cache(arguments)
    _model(arguments)


def generate(arguments: argparse.Namespace) -> None:
    """Of `generate`; the prompts are read: `rows`, a conversation or a text each."""
    sources = ("prompt", "prompts", "messages")
    given = [name for name in sources if getattr(arguments, name) is not None]
    saves_alone = arguments.save_cache is not None and arguments.system is not None
    if len(given) > 1:
        raise ValueError(f"got {' and '.join(given)}, expected one of them")
    if not given and not saves_alone:
        raise ValueError("got nothing to answer, expected a prompt, - , --prompts or --messages")
    many = arguments.prompts is not None
    if arguments.stream and many:
        raise ValueError("--stream prints one text, got --prompts with many")
    if arguments.plain and (arguments.system is not None or arguments.messages is not None):
        raise ValueError("--plain continues a text, got a conversation beside it")
    for flag in ("save_cache", "load_cache"):
        if getattr(arguments, flag) is not None:
            _stored(arguments, f"--{flag.replace('_', '-')}", many)
    _answers(arguments, least_tokens=1 if arguments.save_cache is None else 0)
    arguments.drafts = flags.drafts(arguments)
    _samples(arguments)
    if arguments.mesh is not None:
        flags.mesh(arguments.mesh)
        for flag in ("save_cache", "load_cache", "drafts"):
            if getattr(arguments, flag) is not None:
                name = "speculate" if flag == "drafts" else flag.replace("_", "-")
                raise ValueError(f"--mesh: got --{name} beside it, which is for one device")
    arguments.rows = texts.read(arguments)
    _model(arguments)
    arguments.draft = models.resolve(arguments.draft)


def chat(arguments: argparse.Namespace) -> None:
    """Of `chat`."""
    _answers(arguments, least_tokens=1)
    _model(arguments)


def bench(arguments: argparse.Namespace) -> None:
    """Of `bench`."""
    for path in (arguments.csv, arguments.plot):
        flags.check_folder(path)
    flags.check_at_least(arguments, 1, "batch", "context", "steps", "repeats", "chunk")
    widths = [bits for bits in getattr(arguments, "bits", [4]) if bits != choices.FULL]
    flags.check_bits("--bits", widths)
    if arguments.mesh is not None:
        flags.mesh(arguments.mesh)
    flags.check_segments(arguments)
    _model(arguments)


def plan(arguments: argparse.Namespace) -> None:
    """Of `plan`."""
    parse_memory(arguments.memory)
    if arguments.mesh is not None:
        flags.mesh(arguments.mesh)
    flags.check_cache(arguments)
    models.check_sized(arguments.model)


def calibrate(arguments: argparse.Namespace) -> None:
    """Of `calibrate`."""
    flags.check_folder(arguments.out)
    flags.check_at_least(arguments, 1, "capacity", "windows", "alone", "tensor")
    flags.check_at_least(arguments, 16, "context")
    for name in ("ratio", "kl"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name}: got {value}, expected a number above 0")
    for path in getattr(arguments, "text", []):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, expected a text")
    flags.check_segments(arguments)
    _model(arguments)


def _answers(arguments: argparse.Namespace, least_tokens: int) -> None:
    flags.check_at_least(arguments, least_tokens, "tokens")
    flags.check_at_least(arguments, 1, "chunk")
    if arguments.capacity is not None:
        flags.check_at_least(arguments, 1, "capacity")
    arguments.stop = getattr(arguments, "stop", [])
    if not all(arguments.stop):
        raise ValueError("--stop: got an empty text, expected one to stop at")
    arguments.sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    flags.check_cache(arguments, full=True)


def _samples(arguments: argparse.Namespace) -> None:
    flags.check_at_least(arguments, 1, "samples")
    if arguments.samples == 1:
        return
    for name in ("prompts", "stream", "mesh"):
        if getattr(arguments, name):
            raise ValueError(f"--samples: got --{name} beside it, expected one prompt's answers")
    if arguments.temperature == 0:
        raise ValueError("--samples: got equal answers, expected a --temperature above 0")
    if set(flags.bits(arguments).values()) == {choices.FULL}:
        raise ValueError(f"--samples: got {choices.FULL} bits, expected a compressed cache")


def _stored(arguments: argparse.Namespace, flag: str, many: bool) -> None:
    if many:
        raise ValueError(f"{flag} is for one prompt, got --prompts with many")
    if set(flags.bits(arguments).values()) == {choices.FULL}:
        raise ValueError(f"{flag} is for a compressed cache, got {choices.FULL} bits")
    path = getattr(arguments, flag[2:].replace("-", "_"))
    if flag == "--save-cache":
        flags.check_folder(path)
    elif not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a saved cache")


def _model(arguments: argparse.Namespace) -> None:
    if getattr(arguments, "dtype", None) is not None:
        arguments.dtype = choices.dtype(arguments.dtype)
    arguments.model = models.resolve(arguments.model)
