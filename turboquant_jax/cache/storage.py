"""Save a cache with its config, and restore it: prefill a long prompt once, use it again.

One safetensors file: the arrays of the pytree by their path, and in the header the config, the
capacity and a SHA-256 over all arrays. A file that is damaged, or that belongs to another config or
model, is refused.
"""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from tempfile import NamedTemporaryFile

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from turboquant_jax.cache.state import Cache

FORMAT = "turboquant-jax cache 1"


def save(cache: Cache, path: str | Path, *, model: str) -> None:
    """Write the cache to `path`, whole or not at all. `model` names what filled it."""
    path, arrays = Path(path), _arrays(cache)
    metadata = {
        "format": FORMAT,
        "model": model,
        "config": _describe(cache),
        "sha256": _digest(arrays),
    }
    with NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        temporary = Path(file.name)
    try:
        save_file(arrays, temporary, metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def restore(like: Cache, path: str | Path, *, model: str) -> Cache:
    """Read a cache saved by `save`.

    Args:
      like: a cache of the same config and shapes (from `create`); its contents do not matter.
      path: the file.
      model: what filled the cache; must be what `save` was told.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a damaged file, or one of another format, model, config or shape.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a saved cache")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: got {error}, expected a saved cache") from error
    for name, expected in (("format", FORMAT), ("model", model), ("config", _describe(like))):
        if metadata.get(name) != expected:
            raise ValueError(f"{path}: got {name} {metadata.get(name)}, expected {expected}")
    if _digest(arrays) != metadata.get("sha256"):
        raise ValueError(f"{path}: the arrays do not match their SHA-256, the file is damaged")
    expected_shapes = {name: (a.shape, a.dtype) for name, a in _arrays(like).items()}
    shapes = {name: (a.shape, a.dtype) for name, a in arrays.items()}
    if shapes != expected_shapes:
        raise ValueError(f"{path}: got arrays {shapes}, expected {expected_shapes}")
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    restored = [
        jax.device_put(arrays[jax.tree_util.keystr(where)].view(leaf.dtype), leaf.sharding)
        for where, leaf in leaves
    ]
    return jax.tree.unflatten(structure, restored)


def _arrays(cache: Cache) -> dict[str, np.ndarray]:
    # bfloat16 travels as its bits: numpy readers of safetensors know no bfloat16
    leaves, _ = jax.tree_util.tree_flatten_with_path(cache)
    arrays = {jax.tree_util.keystr(where): np.asarray(leaf) for where, leaf in leaves}
    return {
        name: np.ascontiguousarray(a.view(np.uint16) if a.dtype.name == "bfloat16" else a)
        for name, a in arrays.items()
    }


def _describe(cache: Cache) -> str:
    description = asdict(cache.config) | {"capacity": cache.capacity}
    return json.dumps(description, sort_keys=True)


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()
