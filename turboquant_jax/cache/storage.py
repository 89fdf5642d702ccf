"""Save a cache with its config, and restore it: prefill a long prompt once, use it again.

One safetensors file: the arrays of the pytree by their path, and in the header the config, the
capacity, the levels of the codebooks, the model, and a SHA-256 over all of it and over the arrays.
A file that is damaged, or that belongs to another config or model, is refused.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from turboquant_jax.cache import files
from turboquant_jax.cache.state import Cache

FORMAT = "turboquant-jax cache 2"
_FORMAT_1 = "turboquant-jax cache 1"  # pages of all heads of a layer together


def save(cache: Cache, path: str | Path, *, model: str) -> None:
    """Write the cache to `path`, whole or not at all. `model` names what filled it.

    Raises:
      ValueError: a cache on a mesh, whose rows are in another order.
    """
    path = Path(path)
    _refuse_mesh(cache)
    leaves, _ = tree_flatten_with_path(cache)
    arrays = {keystr(where): portable(np.asarray(leaf)) for where, leaf in leaves}
    facts = {"format": FORMAT, "model": model, "config": describe(cache)}
    files.write(path, arrays, facts)


def restore(like: Cache, path: str | Path, *, model: str) -> Cache:
    """Read a cache saved by `save`.

    Args:
      like: a cache of the same config and shapes, from `create` or, allocating nothing, from
        `jax.eval_shape` of it. Its arrays' contents do not matter; their shardings are kept.
      path: the file.
      model: what filled the cache; must be what `save` was told.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a damaged file, or one of another format, model, config or shape.
    """
    path = Path(path)
    _refuse_mesh(like)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a saved cache")
    metadata, arrays = files.read(path, "a saved cache")
    if metadata.get("format") == _FORMAT_1:
        raise ValueError(
            f"{path}: got a cache of turboquant-jax 0.1, whose pages are laid out otherwise, "
            f"expected {FORMAT!r}: prefill its prompt and save it again"
        )
    for name, expected in (("format", FORMAT), ("model", model), ("config", describe(like))):
        if metadata.get(name) != expected:
            raise ValueError(f"{path}: got {name} {metadata.get(name)}, expected {expected}")
    files.check(path, metadata, ("format", "model", "config"), arrays)
    leaves, structure = tree_flatten_with_path(like)
    shapes = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    expected_shapes = {keystr(where): (leaf.shape, stored(leaf.dtype)) for where, leaf in leaves}
    if shapes != expected_shapes:
        raise ValueError(f"{path}: got arrays {shapes}, expected {expected_shapes}")
    restored = [
        jax.device_put(arrays[keystr(where)].view(leaf.dtype), leaf.sharding)
        for where, leaf in leaves
    ]
    return jax.tree.unflatten(structure, restored)


def _refuse_mesh(cache: Cache) -> None:
    mesh = getattr(getattr(cache.table.page_table, "sharding", None), "mesh", None)
    if mesh is not None and mesh.size > 1:
        raise ValueError(
            f"cache: got one on a mesh of {dict(mesh.shape)}, expected one on one device: "
            "`cache.sharding.save` writes its shards"
        )


def portable(array: np.ndarray) -> np.ndarray:
    """The array as it is stored."""
    return np.ascontiguousarray(array).view(stored(array.dtype))


def stored(dtype: Any) -> np.dtype:
    """bfloat16 travels as its bits: numpy's safetensors know none."""
    return np.dtype(np.uint16 if dtype == jnp.bfloat16 else dtype)


def describe(cache: Cache) -> str:
    """Everything static. The levels are in it, so that codes keep their meaning."""
    levels = [
        [[group.levels for group in codec.groups] for codec in part.codecs] for part in cache.parts
    ]
    config = asdict(cache.config)
    if config["rope_frequencies"] is None:  # so are files that know nothing of them
        del config["rope_frequencies"]
    if config["scale_bits"] == 16:  # and no other scales
        del config["scale_bits"]
    for side in ("key", "value"):
        if config[side]["scales"] == "group":  # so are files that know no other
            del config[side]["scales"]
        if config[side]["code"] != "prod":
            del config[side]["sketch"]
    return json.dumps(config | {"capacity": cache.capacity, "levels": levels}, sort_keys=True)
