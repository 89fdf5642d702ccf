"""The `turboquant-jax` command.

`parsers` has the flags and `checks` what is wrong with them, without importing JAX; of a
subcommand the module of its name is imported only to run it.
"""

import importlib
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from turboquant_jax.cli import flags, parsers


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 with one line on stderr where the input is bad."""
    arguments = parsers.build().parse_args(argv)
    try:
        flags.check_folder(arguments.json)
        arguments.check(arguments)
        result = _run(arguments)
    except (ValueError, FileNotFoundError, NotImplementedError, TimeoutError) as error:
        print(f"turboquant-jax: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # what a shell reports of a program that Ctrl-C ended
    if arguments.json is not None:
        _write_json(arguments.json, result)
    return 0


def _run(arguments: Any) -> dict:
    from rich.console import Console

    module = importlib.import_module(f"turboquant_jax.cli.{arguments.command}")
    kept: Any = nullcontext()
    if hasattr(arguments, "compile_cache"):  # what compiles nothing has no such flag
        from turboquant_jax.cli import compiling

        kept = compiling.kept(arguments.compile_cache)
    with kept:
        return module.run(arguments, Console(soft_wrap=False))


def _write_json(path: Path, result: dict) -> None:
    """The whole file or none of it."""
    with NamedTemporaryFile("w", dir=path.resolve().parent, delete=False) as file:
        json.dump(result, file, indent=2)
        file.write("\n")
    os.replace(file.name, path)
