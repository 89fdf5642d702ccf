"""From a JAX function to a launch plan: the only module that reads what jax keeps to itself.

The function is traced to a jaxpr. Its `pallas_call`s are lowered one by one, for CUDA on any
machine, to a custom call that holds their Triton IR; what depends on no argument is computed by jax
on the CPU and becomes a constant; reshapes are views.

Private are: the custom call's name and attributes, MLIR's Python bindings in jaxlib and the Triton
dialect that prints the IR. So releases are named (`SERVED`). jax deprecates Pallas' Triton backend
from 0.11 on without a date.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax._src.interpreters import mlir  # no public way to MLIR's bindings
from jax._src.lib import triton as triton_dialect
from jax._src.lib.mlir import ir
from jax.extend import core

from pallas_kernels.primitives import triton
from turboquant_jax.pytorch.plan import Buffer, Kernel, Kind, Plan, constant

# Releases whose plans are tested.
SERVED = ("0.10", "0.11", "0.12")

TARGET = "__gpu$xla.gpu.triton"
# Of the oldest GPUs that are served: what is lowered for them runs on all.
DEVICE_KIND = "NVIDIA A100-SXM4-80GB"

VIEWS = ("reshape", "squeeze", "expand_dims", "broadcast_in_dim", "convert_element_type")


def served(version: str) -> bool:
    """Whether plans made by this jax are tested."""
    return ".".join(version.split(".")[:2]) in SERVED


def make_plan(
    function: Callable[..., Any],
    read: Sequence[jax.ShapeDtypeStruct],
    written: Sequence[jax.ShapeDtypeStruct],
) -> Plan:
    """The plan of `function(read, written)`, as `plan_functions.function_of` makes it.

    Raises NotImplementedError for a function that does more than call kernels, and for a jax that
    is not served; ValueError if it overwrites others than those in `written`.
    """
    if not served(jax.__version__):
        raise NotImplementedError(
            f"jax: got {jax.__version__}, launch plans are made by {' or '.join(SERVED)}"
        )
    with (
        _for_gpu(),
        triton.loading_again(),
        jax.default_device(jax.devices("cpu")[0]),
        jax.enable_x64(False),
    ):
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(list(read), list(written))
        tracer = _Tracer()
        inputs: list[Any] = [tracer.buffer("read", i, x) for i, x in enumerate(read)]
        inputs += [tracer.buffer("written", i, x) for i, x in enumerate(written)]
        outputs = tracer.run(closed.jaxpr, closed.consts, inputs)
    count = len(shapes[0])
    for x in outputs[count:]:
        if not isinstance(x, int) or tracer.buffers[x].kind != "written":
            raise ValueError("plan: got a new array for a written one, expected it in place")
    return tracer.plan(shapes[0], outputs[:count])


def _for_gpu() -> Any:
    device = jax.sharding.AbstractDevice(DEVICE_KIND, None, "gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


class _Tracer:
    """Buffers and kernels as they are met. A value is the number of a buffer, or an array."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.kernels: list[Kernel] = []

    def buffer(self, kind: Kind, index: int, aval: Any) -> int:
        self.buffers.append(Buffer(kind, index, tuple(aval.shape), aval.dtype.name))
        return len(self.buffers) - 1

    def run(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, map(np.asarray, consts), strict=True))
        values |= dict(zip(jaxpr.invars, inputs, strict=True))

        def value(x: Any) -> Any:
            if not isinstance(x, core.Literal):
                return values[x]
            aval: Any = x.aval
            return np.asarray(x.val, aval.dtype)

        for eqn in jaxpr.eqns:
            found = self.apply(eqn, [value(x) for x in eqn.invars])
            values |= dict(zip(eqn.outvars, found, strict=True))
        return [value(x) for x in jaxpr.outvars]

    def apply(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        name = eqn.primitive.name
        if name == "pallas_call":
            return self.kernel(eqn, inputs)
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if name in ("jit", "pjit", "closed_call", "custom_jvp_call"):
            return self.run(inner.jaxpr, inner.consts, inputs)
        if not any(isinstance(x, int) for x in inputs):
            found = eqn.primitive.bind(*inputs, **eqn.params)
            return [np.asarray(x) for x in (found if eqn.primitive.multiple_results else [found])]
        before, after = eqn.invars[0].aval, eqn.outvars[0].aval
        if name in VIEWS and before.size == after.size and before.dtype == after.dtype:
            return inputs[:1]
        raise NotImplementedError(
            f"plan: got `{name}` of {before} between the kernels, expected views and constants"
        )

    def kernel(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        aliases = {o: inputs[i] for i, o in eqn.params["input_output_aliases"]}
        arguments = []
        for x in inputs:
            if not isinstance(x, int):
                self.buffers.append(constant(len(self.buffers), x))
                x = len(self.buffers) - 1
            arguments.append(x)
        outputs = []
        for o, var in enumerate(eqn.outvars):
            held = aliases.get(o)
            if held is None:
                held = self.buffer("scratch", len(self.buffers), var.aval)
            elif not isinstance(held, int) or self.buffers[held].kind not in ("written", "scratch"):
                raise ValueError(f"plan: got {var.aval} overwritten, expected it among `written`")
            outputs.append(held)
        self.kernels.append(_lower(eqn, (*arguments, *outputs)))
        return outputs

    def plan(self, avals: Sequence[Any], outputs: Sequence[Any]) -> Plan:
        """With those scratch buffers as outputs, in the shapes of the function's results."""
        for i, (aval, x) in enumerate(zip(avals, outputs, strict=True)):
            if not isinstance(x, int) or self.buffers[x].kind != "scratch":
                raise NotImplementedError(f"plan: got {aval} returned, expected a kernel's result")
            self.buffers[x] = Buffer("output", i, tuple(aval.shape), aval.dtype.name)
        return Plan(jax.__version__, tuple(self.buffers), tuple(self.kernels))


def _lower(eqn: Any, arguments: tuple[int, ...]) -> Kernel:
    """The kernel of one `pallas_call`."""
    avals = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in eqn.invars]

    def call(*operands: Any) -> Any:
        return eqn.primitive.bind(*operands, **eqn.params)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", triton.DEPRECATION, DeprecationWarning)
        traced = jax.jit(call, keep_unused=True).trace(*avals)
        module = traced.lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
    (found,) = _custom_calls(module.body.operations)
    operands = [ir.BlockArgument(x).arg_number for x in found.operands]
    if operands != list(range(len(avals))):
        raise NotImplementedError(f"plan: got the kernel's operands as {operands}, expected all")
    config = ir.DictAttr(found.attributes["mhlo.backend_config"])

    def number(name: str) -> int:
        return ir.IntegerAttr(config[name]).value

    return Kernel(
        name=ir.StringAttr(config["name"]).value,
        ttir=_text(ir.StringAttr(config["ir"]).value_bytes),
        grid=(number("grid_x"), number("grid_y"), number("grid_z")),
        warps=number("num_warps"),
        stages=number("num_stages"),
        arguments=arguments,
    )


def _custom_calls(operations: Any) -> list[Any]:
    """The Triton kernels anywhere in some operations."""
    found = []
    for operation in operations:
        target = operation.attributes.get("call_target_name")
        if target is not None and ir.StringAttr(target).value == TARGET:
            found.append(operation)
        for region in operation.operation.regions:
            for block in region.blocks:
                found += _custom_calls(block.operations)
    return found


def _text(bytecode: bytes) -> str:
    """Triton IR as text, without the places in the source, which differ between machines."""
    with mlir.make_ir_context() as context, ir.Location.unknown(context):
        triton_dialect.dialect.register_dialect(context)
        module = ir.Module.parse(bytecode)
        return str(module.operation.get_asm(enable_debug_info=False))
