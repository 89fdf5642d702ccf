"""Safetensors files that are written whole or not at all, and that say what they hold.

The header has facts, and a SHA-256 over them and over the arrays.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


def write(path: Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, str]) -> None:
    """Replace the file at `path` in one step; the order of the facts is that of their digest."""
    with NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        temporary = Path(file.name)
    try:
        save_file(dict(arrays), temporary, {**facts, "sha256": digest(facts, arrays)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path, what: str) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Facts and arrays; ValueError for another kind of file. `check` compares the digest."""
    try:
        with safe_open(path, framework="numpy") as file:
            names = file.keys()
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: got {error}, expected {what}") from error


def check(
    path: Path, found: Mapping[str, str], names: tuple[str, ...], arrays: Mapping[str, np.ndarray]
) -> None:
    """ValueError unless the facts of these names, and the arrays, are what was written."""
    if digest({name: found[name] for name in names}, arrays) != found.get("sha256"):
        raise ValueError(f"{path}: the contents do not match their SHA-256, the file is damaged")


def digest(facts: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of facts in their order and of arrays by name."""
    made = hashlib.sha256()
    for name, fact in facts.items():
        made.update(f"{name} {fact}\n".encode())
    for name, array in sorted(arrays.items()):
        made.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        made.update(array.reshape(-1).view(np.uint8).data)
    return made.hexdigest()
