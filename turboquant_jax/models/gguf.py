"""The GGUF container: metadata, and tensors dequantized one at a time to float32.

The header is read here, every length checked against the file before it is used, because the
reader of the `gguf` package runs past the end of a truncated file. Layout, little endian:
magic, version, counts of tensors and keys, the keys, the tensor descriptions, padding, the data
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import dataclasses
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
# Number of a scalar type -> its letter for `struct` and for numpy.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"}
_SCALARS |= {10: "Q", 11: "q", 12: "d"}
_MAX_DIMS = 4


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """One tensor of the file; the shape is (out, in), as in torch, the file stores it reversed."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int  # bytes from the start of the file
    size: int  # bytes


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """An opened file; its tensors stay on disk until they are read."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, as `read` returns it."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """Dequantize one tensor to float32; ValueError for a quantization that is not known."""
        tensor = self.tensors[name]
        raw = np.fromfile(self.path, np.uint8, tensor.size, offset=tensor.start)
        try:
            values = dequantize(raw.reshape(*tensor.shape[:-1], -1), tensor.kind)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.path}: tensor {name}: got {tensor.kind.name}, "
                "expected a type that the gguf package dequantizes"
            ) from error
        return np.asarray(values, np.float32).reshape(tensor.shape)


def open_gguf(path: Path) -> GGUFFile:
    """Read and check the header of a GGUF file, version 2 or 3.

    Raises ValueError for a file of another kind, cut short, or whose header contradicts itself.
    """
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path}: got an empty file, expected a GGUF file")
    with path.open("rb") as file:
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    cursor = _Cursor(path, mapped)
    magic = bytes(cursor.take(len(_MAGIC), "magic"))
    if magic != _MAGIC:
        raise ValueError(f"{path}: got magic bytes {magic!r}, expected {_MAGIC!r} of a GGUF file")
    version = cursor.scalar("I", "version")
    if version not in _VERSIONS:
        raise ValueError(f"{path}: got GGUF version {version}, expected 2 or 3, little endian")
    tensor_count, key_count = (cursor.scalar("Q", f"{what} count") for what in ("tensor", "key"))
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.string("metadata key")
        if key in metadata:
            raise ValueError(f"{path}: got key {key} twice, expected it once")
        metadata[key] = cursor.value(cursor.scalar("I", key), key)
    described = [cursor.tensor() for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"{path}: got alignment {alignment!r}, expected a positive integer")
    data_start = -(-cursor.offset // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, tensor in described:
        if name in tensors:
            raise ValueError(f"{path}: got tensor {name} twice, expected it once")
        tensor = dataclasses.replace(tensor, start=data_start + tensor.start)
        if tensor.start + tensor.size > size:
            raise ValueError(
                f"{path}: truncated GGUF file: got {size} bytes, expected at least "
                f"{tensor.start + tensor.size} for tensor {name}"
            )
        tensors[name] = tensor
    return GGUFFile(path, MappingProxyType(metadata), MappingProxyType(tensors))


@dataclasses.dataclass
class _Cursor:
    """A position in the bytes of a header; nothing is read before its extent is checked."""

    path: Path
    data: memoryview
    offset: int = 0

    def take(self, count: int, what: str) -> memoryview:
        end = self.offset + count
        if end > len(self.data):
            raise ValueError(
                f"{self.path}: truncated GGUF file: got {len(self.data)} bytes, "
                f"expected at least {end} to hold {what}"
            )
        taken = self.data[self.offset : end]
        self.offset = end
        return taken

    def scalar(self, letter: str, what: str) -> Any:
        form = "<" + letter
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def string(self, what: str) -> str:
        raw = bytes(self.take(self.scalar("Q", what), what))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: {what}: got {raw!r}, expected UTF-8 text") from error

    def value(self, kind: int, what: str) -> Any:
        """A metadata value: a number, a truth value, a string, or a list of one of them."""
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            return self.scalar(self._letter(kind, what), what)
        item, count = self.scalar("I", what), self.scalar("Q", what)
        if item == _STRING:
            return [self.string(what) for _ in range(count)]
        form = np.dtype(self._letter(item, what)).newbyteorder("<")
        return np.frombuffer(self.take(count * form.itemsize, what), form).tolist()

    def _letter(self, kind: int, what: str) -> str:
        if kind not in _SCALARS:
            raise ValueError(
                f"{self.path}: {what}: got value type {kind}, expected that of a scalar"
            )
        return _SCALARS[kind]

    def tensor(self) -> tuple[str, GGUFTensor]:
        """The next description; its start still counts from the start of the data."""
        name = self.string("tensor name")
        dims = self.scalar("I", name)
        if dims > _MAX_DIMS:
            raise ValueError(f"{self.path}: tensor {name}: got {dims} dimensions, expected <= 4")
        shape = tuple(self.scalar("Q", name) for _ in range(dims))[::-1]
        number, start = self.scalar("I", name), self.scalar("Q", name)
        try:
            kind = GGMLQuantizationType(number)
            block, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{self.path}: tensor {name}: got type {number}, expected a GGML type"
            ) from error
        count = math.prod(shape)
        if not shape or count == 0 or shape[-1] % block:
            raise ValueError(
                f"{self.path}: tensor {name}: got shape {shape}, "
                f"expected rows of whole blocks of {block} values"
            )
        return name, GGUFTensor(shape, kind, start, count // block * block_bytes)
