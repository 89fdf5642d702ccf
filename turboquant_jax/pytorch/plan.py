"""A launch plan: a call of the JAX kernels as data that torch and its Triton can run.

No jax and no torch here. A plan is the kernels of one call in their order, each with its Triton IR,
grid, warps and stages, and the buffers that they pass to each other. Between kernels there is
nothing but views and constants: what else a call would compute on its arrays is refused when the
plan is made, so that a plan needs no second definition of jax's operations.
"""

import base64
import json
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

FORMAT = 1

Kind = Literal["read", "written", "output", "constant", "scratch"]


@dataclass(frozen=True)
class Buffer:
    """Memory that kernels share, contiguous, in row-major order.

    Attributes:
      kind: "read" and "written" are tensors of the caller, the latter overwritten in place; an
        "output" is a new tensor, written whole; "scratch" is passed from kernel to kernel.
      index: which one of its kind; of scratch and constants a running number.
      shape, dtype: as numpy names them, and "bfloat16".
      data: the bytes of a constant, in base64.
    """

    kind: Kind
    index: int
    shape: tuple[int, ...]
    dtype: str
    data: str | None = None

    def bytes(self) -> bytes:
        """The bytes of a constant."""
        if self.data is None:
            raise ValueError(f"buffer: got {self.kind}, expected a constant")
        return base64.b64decode(self.data)


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
      ttir: the Triton IR as text.
      arguments: number of the buffer that each pointer is, inputs first, then outputs; a buffer
        that is overwritten in place is there twice.
    """

    name: str
    ttir: str
    grid: tuple[int, int, int]
    warps: int
    stages: int
    arguments: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Kernels in their order, and the jax that made them."""

    jax: str
    buffers: tuple[Buffer, ...]
    kernels: tuple[Kernel, ...]

    def of_kind(self, kind: Kind) -> tuple[Buffer, ...]:
        """Its buffers of a kind, in their order."""
        found = [buffer for buffer in self.buffers if buffer.kind == kind]
        return tuple(sorted(found, key=lambda buffer: buffer.index))


def constant(index: int, array: np.ndarray) -> Buffer:
    """A buffer that holds this array."""
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
    return Buffer("constant", index, array.shape, array.dtype.name, data)


def dumps(plan: Plan) -> str:
    """The plan as JSON."""
    return json.dumps({"format": FORMAT, **asdict(plan)}, sort_keys=True)


def loads(text: str) -> Plan:
    """The plan of a JSON text; ValueError if it is none, or of another format."""
    try:
        found = json.loads(text)
        version = found.pop("format")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError("plan: got a text that is none, expected one of `dumps`") from error
    if version != FORMAT:
        raise ValueError(f"format of a plan: got {version}, expected {FORMAT}")
    try:
        buffers = [Buffer(**x | {"shape": tuple(x["shape"])}) for x in found["buffers"]]
        kernels = [
            Kernel(**x | {"grid": tuple(x["grid"]), "arguments": tuple(x["arguments"])})
            for x in found["kernels"]
        ]
        return Plan(found["jax"], tuple(buffers), tuple(kernels))
    except (KeyError, TypeError) as error:
        raise ValueError(f"plan: got wrong fields, expected those of format {FORMAT}") from error
