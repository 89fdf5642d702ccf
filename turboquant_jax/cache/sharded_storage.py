"""Save a cache on several devices and restore it: a folder, of each shard a file of its own.

A file has the arrays of its device under their paths, and in the header what `storage` has there,
the mesh, the place of the shard in it, and a number that all files of one call of `save` share.
Every host writes and reads the shards of its own devices, in a folder that all of them see.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.tree_util import keystr, tree_flatten_with_path

from turboquant_jax.cache import files, storage
from turboquant_jax.cache.mesh import specs
from turboquant_jax.cache.state import Cache

FORMAT = "turboquant-jax shard 1"
_FACTS = ("format", "model", "config", "mesh", "shard", "save")


def save(mesh: Mesh, cache: Cache, path: str | Path, *, model: str) -> None:
    """Write the folder `path`, whole or not at all; what stood there is replaced.

    Every process of the mesh calls it. `model` names what filled the cache.

    Raises:
      ValueError: something at `path` that is no saved cache.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and all(map(_is_shard, path.iterdir()))):
        raise ValueError(f"{path}: got something else there, expected nothing or a saved cache")
    number = int.from_bytes(os.urandom(4), "little")
    number = int(_agreed(np.uint32(number)))
    scratch = path.with_name(f".{path.name}.{number}")
    leaves, _ = tree_flatten_with_path(jax.device_put(cache, _places(cache, mesh)))
    facts = {"format": FORMAT, "model": model, "config": storage.describe(cache)}
    try:
        scratch.mkdir(exist_ok=True)
        for index, device in _own_devices(mesh):
            arrays = {keystr(name): storage.portable(_on(leaf, device)) for name, leaf in leaves}
            which = {"mesh": _sizes(mesh), "shard": str(index), "save": str(number)}
            files.write(scratch / _name(mesh, index), arrays, facts | which)
        _agreed(np.uint32(0))  # every host has written
        if jax.process_index() == 0:
            stale = path.with_name(f"{scratch.name}.old")
            if path.exists():
                path.rename(stale)
            scratch.rename(path)
            shutil.rmtree(stale, ignore_errors=True)
        _agreed(np.uint32(0))
    finally:
        if jax.process_index() == 0:
            shutil.rmtree(scratch, ignore_errors=True)


def restore(mesh: Mesh, like: Cache, path: str | Path, *, model: str) -> Cache:
    """Read a cache saved by `save` to the devices of a mesh of the same sizes.

    Every process of the mesh calls it.

    Args:
      mesh: where the cache is to be.
      like: a cache of the same config and shapes, from `sharding.create` or `jax.eval_shape` of it.
      path: the folder.
      model: what filled the cache; must be what `save` was told.

    Raises:
      FileNotFoundError: no such folder, or a shard that is missing.
      ValueError: a damaged file, one of another save, or of another format, model, config, mesh or
        shape.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder, expected a saved cache of a mesh")
    expected = {_name(mesh, index) for index in range(mesh.size)}
    found = {file.name for file in path.iterdir()}
    if found and not found & expected:
        raise ValueError(f"{path}: got {sorted(found)[0]}, expected {_name(mesh, 0)}: another mesh")
    if missing := sorted(expected - found):
        raise FileNotFoundError(f"{path}: got no {missing[0]}, expected {mesh.size} shards")
    leaves, structure = tree_flatten_with_path(like)
    places = jax.tree.leaves(_places(like, mesh))
    facts = {"format": FORMAT, "model": model, "config": storage.describe(like)}
    facts |= {"mesh": _sizes(mesh)}
    parts: list[list[jax.Array]] = [[] for _ in leaves]
    for index, device in _own_devices(mesh):
        file = path / _name(mesh, index)
        arrays = _read(file, facts | {"shard": str(index)})
        facts.setdefault("save", arrays.pop("save"))
        shapes = {name: (array.shape, array.dtype) for name, array in arrays.items()}
        wanted = {
            keystr(name): (place.shard_shape(leaf.shape), storage.stored(leaf.dtype))
            for (name, leaf), place in zip(leaves, places, strict=True)
        }
        if shapes != wanted:
            raise ValueError(f"{file}: got arrays {shapes}, expected {wanted}")
        for part, (name, leaf) in zip(parts, leaves, strict=True):
            part.append(jax.device_put(arrays[keystr(name)].view(leaf.dtype), device))
    made = [
        jax.make_array_from_single_device_arrays(leaf.shape, place, part)
        for (_, leaf), place, part in zip(leaves, places, parts, strict=True)
    ]
    return jax.tree.unflatten(structure, made)


def _read(file: Path, expected: dict[str, str]) -> dict[str, Any]:
    """The arrays of a shard, and which save it is of."""
    metadata, arrays = files.read(file, "a shard of a saved cache")
    for name, value in expected.items():
        if metadata.get(name) != value:
            raise ValueError(f"{file}: got {name} {metadata.get(name)}, expected {value}")
    files.check(file, metadata, _FACTS, arrays)
    return arrays | {"save": metadata["save"]}


def _own_devices(mesh: Mesh) -> Iterator[tuple[int, Any]]:
    """Devices of this process, and their numbers in the mesh."""
    for index, device in enumerate(mesh.devices.ravel()):
        if device.process_index == jax.process_index():
            yield index, device


def _on(leaf: jax.Array, device: Any) -> np.ndarray:
    (own,) = (shard.data for shard in leaf.addressable_shards if shard.device == device)
    return np.asarray(own)


def _places(cache: Cache, mesh: Mesh) -> Cache:
    return jax.tree.map(lambda _, spec: NamedSharding(mesh, spec), cache, specs(cache))


def _sizes(mesh: Mesh) -> str:
    return json.dumps(dict(mesh.shape))


def _name(mesh: Mesh, index: int) -> str:
    return f"shard-{index:05}-of-{mesh.size:05}.safetensors"


def _is_shard(file: Path) -> bool:
    return file.name.startswith("shard-") and file.suffix == ".safetensors"


def _agreed(number: np.uint32) -> np.uint32:
    """The number of the first process, once all have come here."""
    if jax.process_count() == 1:
        return number
    return multihost_utils.broadcast_one_to_all(number)
