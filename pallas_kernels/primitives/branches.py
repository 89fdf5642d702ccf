"""Branches of a kernel as functions of their own, so that Triton compiles in less time.

For every load Triton's pass that coalesces loads collects what depends on it and what it depends
on: by way of shared constants that is the whole kernel, and of each operation found it collects the
same again. With several large branches that takes minutes. The pass stays within a function. A
branch that is one is called once a program, beside thousands of instructions of its loop.

Private to jax are: which rule lowers a `pallas_call`, and MLIR's bindings. A jax that lacks them
compiles the kernel whole.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jax.experimental.pallas import triton as backend

try:
    from jax._src.interpreters import mlir
    from jax._src.lib import triton as dialects
    from jax._src.lib.mlir import ir
    from jax._src.pallas.core import register_lowering_rule
    from jax._src.pallas.triton.pallas_call_registration import pallas_call_lowering

    SERVED = True
except ImportError:
    SERVED = False

LARGE = 300
"""Operations of a branch that becomes a function."""
LONG = 6000
"""Operations of all of them, where that is worth it: a function takes some more registers."""


@dataclass(frozen=True)
class Apart(backend.CompilerParams):
    """Compiler parameters of a kernel whose large branches become functions, if it is long."""


def parameters(warps: int, stages: int, apart: bool) -> backend.CompilerParams:
    """Those of a kernel; `apart` if its large branches are to become functions."""
    kind = Apart if apart and SERVED else backend.CompilerParams
    return kind(num_warps=warps, num_stages=stages)


def _lower(context: Any, *operands: Any, compiler_params: Apart, **options: Any) -> Any:
    """As jax does; then the IR in the custom call is exchanged."""
    plain = backend.CompilerParams(compiler_params.num_warps, compiler_params.num_stages)
    results = pallas_call_lowering(context, *operands, compiler_params=plain, **options)
    attributes = results[0].owner.attributes
    config = ir.DictAttr(attributes["mhlo.backend_config"])
    made = {config[i].name: config[i].attr for i in range(len(config))}
    made["ir"] = ir.StringAttr.get(outlined(ir.StringAttr(made["ir"]).value_bytes))
    attributes["mhlo.backend_config"] = ir.DictAttr.get(made)
    return results


if SERVED:
    register_lowering_rule(Apart, _lower, "gpu")


def outlined(bytecode: bytes) -> bytes:
    """A module of Triton IR, the large branches of its kernel as functions where it is long."""
    with mlir.make_ir_context() as context, ir.Location.unknown(context):
        dialects.dialect.register_dialect(context)
        module = ir.Module.parse(bytecode)
        (kernel,) = module.body.operations
        (entry,) = kernel.operation.regions[0].blocks
        large = [*_large(entry)]
        if sum(len(ops) for _, ops in large) < LONG:
            return bytecode
        for number, (block, ops) in enumerate(large):
            _outline(module, block, ops, f"branch_{number}")
        module.operation.verify()
        buffer = io.BytesIO()
        module.operation.write_bytecode(buffer)
        return buffer.getvalue()


def _large(block: Any) -> Iterator[tuple[Any, list[Any]]]:
    """The outermost large branches in a block, and their operations."""
    for op in block.operations:
        is_branch = op.operation.name == "scf.if" and not len(op.operation.results)
        for region in op.operation.regions:
            for inner in region.blocks:
                ops = [*_nested(inner)] if is_branch else []
                if len(ops) >= LARGE:
                    yield inner, ops
                else:
                    yield from _large(inner)


def _nested(block: Any) -> Iterator[Any]:
    """The operations of a block and those within them."""
    for op in block.operations:
        yield op.operation
        for region in op.operation.regions:
            for inner in region.blocks:
                yield from _nested(inner)


def _outline(module: Any, block: Any, ops: list[Any], name: str) -> None:
    """Move what a branch does, `ops`, into a function of this name, and call it instead.

    Its arguments are what the branch takes from outside; constants it makes itself.
    """
    made = {value for op in ops for value in op.results}
    made |= {
        value
        for op in ops
        for region in op.regions
        for at in region.blocks
        for value in at.arguments
    }
    taken = [(op, place, value) for op in ops for place, value in enumerate(op.operands)]
    outside = dict.fromkeys(value for _, _, value in taken if value not in made)
    constants = [value for value in outside if _is_constant(value)]
    arguments = [value for value in outside if not _is_constant(value)]
    types = [value.type for value in arguments]
    attributes = {
        "sym_name": ir.StringAttr.get(name),
        "function_type": ir.TypeAttr.get(ir.FunctionType.get(types, [])),
        "sym_visibility": ir.StringAttr.get("private"),
        "noinline": ir.BoolAttr.get(True),
    }
    function = ir.Operation.create(
        "tt.func", attributes=attributes, regions=1, ip=ir.InsertionPoint(module.body)
    )
    body = function.regions[0].blocks.append(*types)
    own = dict(zip(arguments, body.arguments, strict=True))
    with ir.InsertionPoint(body):
        own |= {value: value.owner.clone().operation.results[0] for value in constants}
    for op, place, value in taken:
        if value in own:
            op.operands[place] = own[value]
    *moved, end = [op.operation for op in block.operations]
    for op in moved:
        body.append(op)
    with ir.InsertionPoint(body):
        ir.Operation.create("tt.return")
    with ir.InsertionPoint(end):
        callee: Any = ir.FlatSymbolRefAttr.get(name)
        ir.Operation.create("tt.call", operands=arguments, attributes={"callee": callee})


def _is_constant(value: Any) -> bool:
    return not isinstance(value.owner, ir.Block) and value.owner.name == "arith.constant"
