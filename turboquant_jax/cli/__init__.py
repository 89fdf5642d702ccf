"""The `turboquant-jax` command: one module a subcommand, with `add` and `run`."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile

from rich.console import Console

from turboquant_jax.cli import bench, demo, generate, plan


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 with one line on stderr where the input is bad."""
    parser = argparse.ArgumentParser(
        prog="turboquant-jax",
        description="TurboQuant: compress the KV cache of a language model, and attend to it.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (demo, generate, bench, plan):
        module.add(commands)
    arguments = parser.parse_args(argv)
    try:
        _check_output(arguments.json)
        result = arguments.run(arguments, Console(soft_wrap=False))
    except (ValueError, FileNotFoundError, NotImplementedError) as error:
        print(f"turboquant-jax: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if arguments.json is not None:
        _write_json(arguments.json, result)
    return 0


def _check_output(path: Path | None) -> None:
    if path is not None and not path.resolve().parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder, expected one for {path.name}")


def _write_json(path: Path, result: dict) -> None:
    """The whole file or none of it."""
    with NamedTemporaryFile("w", dir=path.resolve().parent, delete=False) as file:
        json.dump(result, file, indent=2)
        file.write("\n")
    os.replace(file.name, path)
