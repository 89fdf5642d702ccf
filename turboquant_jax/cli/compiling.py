"""Compiled programs are kept for the next run, and whoever waits for them sees that it works."""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

import jax
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

VARIABLE = "TURBOQUANT_JAX_COMPILE_CACHE"
_OFF = ("off", "")

T = TypeVar("T")


def settings(flag: str | None, environment: Mapping[str, str]) -> dict[str, object]:
    """JAX's settings for the flag, else for our variable, else for JAX's own, else the default.

    Raises:
      ValueError: a folder that was named and cannot be made.
    """
    said = environment.get(VARIABLE) if flag is None else flag
    if said is None and "JAX_COMPILATION_CACHE_DIR" in environment:
        return {}
    if said is not None and said.lower() in _OFF:
        return {"jax_compilation_cache_dir": None}
    caches = Path(environment.get("XDG_CACHE_HOME") or "~/.cache")
    folder = (caches / "turboquant-jax" if said is None else Path(said)).expanduser()
    try:
        # what lies in it is run: nobody else may write there
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        if said is not None:
            raise ValueError(f"--compile-cache: got {error}, expected a folder or off") from error
        print(f"turboquant-jax: compiled programs are not kept: {error}", file=sys.stderr)
        return {}
    return {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }


@contextmanager
def kept(flag: str | None) -> Iterator[None]:
    """Keep what is compiled inside as `settings` says; JAX is as before afterwards."""
    changes = settings(flag, os.environ)
    before = {name: getattr(jax.config, name) for name in changes}
    _configure(changes)
    try:
        yield
    finally:
        _configure(before)


def _configure(changes: Mapping[str, object]) -> None:
    for name, value in changes.items():
        jax.config.update(name, value)
    if changes:
        compilation_cache.reset_cache()  # it looks at its folder only once


@contextmanager
def shown(what: str) -> Iterator[None]:
    """What is being done and for how long, on a terminal's standard error."""
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as p:
        p.add_task(what, total=None)
        yield


def awaited(items: Iterable[T], what: str) -> Iterator[T]:
    """The same items; `shown` until the second is there, for which the loop has been compiled."""
    iterator = iter(items)
    with shown(what):
        first = list(islice(iterator, 2))
    return chain(first, iterator)
