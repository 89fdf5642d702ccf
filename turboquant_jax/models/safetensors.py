"""Tensors of a safetensors file, or of the shards named by an index, read one at a time."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from turboquant_jax.models.files import read_json_object

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_KINDS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class SafetensorsFolder:
    """The tensors below one folder; they stay on disk until they are read."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    shards: Mapping[str, Path]  # which file holds a tensor

    def read(self, name: str) -> np.ndarray:
        """One tensor in the dtype of the file, bfloat16 as `ml_dtypes.bfloat16`."""
        with _opened(self.shards[name]) as shard:
            return shard.get_tensor(name)


def open_safetensors(folder: Path) -> SafetensorsFolder:
    """Read and check the headers of `model.safetensors`, or of every shard in the index beside it.

    Raises FileNotFoundError where there is neither or a shard is missing, and ValueError for a file
    of another kind, cut short, holding other numbers than floats, or disagreeing with the index.
    """
    index = folder / _INDEX
    paths = _indexed_shards(index) if index.exists() else [folder / _SINGLE]
    shapes: dict[str, tuple[int, ...]] = {}
    shards: dict[str, Path] = {}
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, expected safetensors weights")
        for name, shape in _header(path).items():
            if name in shapes:
                raise ValueError(f"{path}: got tensor {name} that {shards[name]} holds too")
            shapes[name], shards[name] = shape, path
    if index.exists():
        _require_agreement(index, shards)
    return SafetensorsFolder(folder, MappingProxyType(shapes), MappingProxyType(shards))


def _opened(path: Path):
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: got {error}, expected a whole safetensors file") from error


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    shapes = {}
    with _opened(path) as shard:
        for name in shard.keys():  # noqa: SIM118 - safe_open is no mapping
            entry = shard.get_slice(name)
            if entry.get_dtype() not in _KINDS:
                raise ValueError(
                    f"{path}: tensor {name}: got {entry.get_dtype()}, "
                    f"expected one of {', '.join(_KINDS)}"
                )
            shapes[name] = tuple(entry.get_shape())
    return shapes


def _weight_map(index: Path) -> dict[str, str]:
    names = read_json_object(index).get("weight_map")
    if not isinstance(names, dict):
        raise ValueError(f"{index}: weight_map: got {names!r}, expected file names of tensors")
    for name in names.values():
        if not (isinstance(name, str) and name == Path(name).name):
            raise ValueError(f"{index}: weight_map: got {name!r}, expected a plain file name")
    return names


def _indexed_shards(index: Path) -> list[Path]:
    return [index.parent / name for name in sorted(set(_weight_map(index).values()))]


def _require_agreement(index: Path, shards: Mapping[str, Path]) -> None:
    """Every tensor of the index lies in the shard it names."""
    for name, shard in _weight_map(index).items():
        if name not in shards or shards[name].name != shard:
            got = shards[name].name if name in shards else "no shard"
            raise ValueError(f"{index}: tensor {name}: got {got}, expected {shard} to hold it")
