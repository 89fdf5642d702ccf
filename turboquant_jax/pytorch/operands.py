"""Operands of the kernels with torch tensors in them, and what of a call is static, as text.

An operand has the name and the fields that its class has in `pallas_kernels`, where they are
documented and checked: shapes, dtypes and layout are those of the JAX kernels. So a new field or a
new format needs no change here.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch


class Operand:
    """Tensors and static facts by the field names of a class in `pallas_kernels`.

    Static are None, bool, int, finite float, str and sequences of those; a field may hold operands.
    """

    def __init__(self, kind: str, **fields: Any):
        self.kind, self.fields = kind, fields
        tensors: list[torch.Tensor] = []
        text = _write(self, tensors, [], [])
        self.static = None if tensors else text  # written once for all calls

    def __getattr__(self, name: str) -> Any:
        if name == "fields" or name not in self.fields:
            raise AttributeError(f"{name}: not a field of this operand")
        return self.fields[name]

    def __repr__(self) -> str:
        return f"{self.kind}({', '.join(f'{k}={v!r}' for k, v in self.fields.items())})"


BlocksOperand = partial(Operand, "BlocksOperand")
CodebookOperand = partial(Operand, "CodebookOperand")
CodeOperand = partial(Operand, "CodeOperand")
ExactOperand = partial(Operand, "ExactOperand")
GroupOperand = partial(Operand, "GroupOperand")
PagedBlocks = partial(Operand, "PagedBlocks")
PhasesOperand = partial(Operand, "PhasesOperand")
Pool = partial(Operand, "Pool")
PreRopeOperand = partial(Operand, "PreRopeOperand")
RotationOperand = partial(Operand, "RotationOperand")
Schedule = partial(Operand, "Schedule")
Sketch = partial(Operand, "Sketch")
Softmax = partial(Operand, "Softmax")


def Places(
    *,
    sinks: int,
    window: int,
    block: int,
    sliding_window: int | None,
    sink_slots: int,
    ring: int,
    slots: int,
) -> Operand:
    """Where the tokens of a sequence lie, for `ExactOperand.places`.

    The first four as in `CacheConfig`. `sink_slots`, `ring`: slots of the sinks' and the window's
    tensors, 0 where there is no such segment; `slots`: columns of the page table.
    """
    return Operand(
        "Places", sinks=sinks, window=window, block=block, sliding_window=sliding_window,
        sink_slots=sink_slots, ring=ring, slots=slots,
    )  # fmt: skip


def places_of(layout: Any) -> Operand:
    """`Places` of a layout, be it of the torch cache or of the JAX cache."""
    config = layout.config
    return Places(
        sinks=config.sinks,
        window=config.window,
        block=config.block,
        sliding_window=config.sliding_window,
        sink_slots=layout.sinks,
        ring=layout.ring,
        slots=layout.slots,
    )


def flatten(
    arguments: dict[str, Any], written: Sequence[torch.Tensor]
) -> tuple[str, list[torch.Tensor], list[torch.Tensor]]:
    """(the arguments as JSON with a place for every tensor, tensors read, tensors written to).

    A tensor is {"read": i} or {"written": i} of its list; in `written` are those of `written` that
    the arguments have.
    """
    read: list[torch.Tensor] = []
    found: list[torch.Tensor] = []
    return _write(arguments, read, found, written), read, found


def _write(x: Any, read: list, found: list, written: Sequence[torch.Tensor]) -> str:
    if isinstance(x, torch.Tensor):
        into, name = (found, "written") if any(x is y for y in written) else (read, "read")
        into.append(x)
        return f'{{"{name}": {len(into) - 1}}}'
    if isinstance(x, Operand):
        static = x.__dict__.get("static")
        if static is not None:
            return str(static)
        return f'{{"kind": "{x.kind}", "fields": {_write(x.fields, read, found, written)}}}'
    if isinstance(x, dict):
        parts = [f'"{key}": {_write(value, read, found, written)}' for key, value in x.items()]
        return "{" + ", ".join(parts) + "}"
    if isinstance(x, (tuple, list)):
        return "[" + ", ".join([_write(value, read, found, written) for value in x]) + "]"
    return _literal(x)


def _literal(x: Any) -> str:
    if x is None:
        return "null"
    if isinstance(x, bool):
        return "true" if x else "false"
    if isinstance(x, int):
        return str(int(x))
    if isinstance(x, float) and math.isfinite(x):
        return repr(float(x))
    if isinstance(x, str) and x.isidentifier():
        return f'"{x}"'
    if isinstance(x, torch.dtype):
        return f'"{str(x)[6:]}"'
    raise ValueError(f"operand: got {x!r}, expected a tensor, a finite number, a name or None")
