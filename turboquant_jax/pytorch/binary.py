"""GPU code of one kernel, as data. No torch, jax or triton here."""

import base64
import json
from dataclasses import asdict, dataclass

FORMAT = 1


@dataclass(frozen=True)
class Binary:
    """GPU code of one kernel.

    Attributes:
      cubin: for `cuModuleLoadData`; `name` is that of the kernel in it.
      shared: bytes of dynamic shared memory.
      pointers: that the kernel takes: those of the plan, then scratch of Triton's, which is unused.
      spilled: bytes of registers that a thread puts aside.
      warps: of a program; twice those of the plan where one spills without.
    """

    name: str
    cubin: bytes
    shared: int
    pointers: int
    spilled: int
    warps: int


def dumps(binary: Binary) -> str:
    """The code as JSON."""
    cubin = base64.b64encode(binary.cubin).decode("ascii")
    return json.dumps(asdict(binary) | {"cubin": cubin}, sort_keys=True)


def loads(text: str) -> Binary | None:
    """The code of a JSON text, or None if it is not whole."""
    try:
        found = json.loads(text)
        return Binary(**found | {"cubin": base64.b64decode(found["cubin"], validate=True)})
    except (ValueError, KeyError, TypeError):
        return None
