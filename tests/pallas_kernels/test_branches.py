"""Large branches of a kernel are functions in its Triton IR, and nothing else is changed."""

from collections import Counter

import jax
import pytest
from jax._src.interpreters import mlir  # no public way to MLIR's bindings
from jax._src.lib import triton as dialects
from jax._src.lib.mlir import ir

from pallas_kernels.primitives import branches, triton
from tests.pallas_kernels import cases

LOOP = "scf.for"


def modules(name):
    """Triton IR of each kernel of a case, by the kernel's name."""
    case = cases.MAKERS[name]()
    lowered = cases.lower(case.function, *case.arguments).compiler_ir("stablehlo")
    found = {}

    def visit(op):
        if "mhlo.backend_config" in op.operation.attributes:
            config = op.operation.attributes["mhlo.backend_config"]
            if isinstance(config, ir.DictAttr) and "ir" in config:
                kernel = ir.StringAttr(config["name"]).value
                found[kernel] = ir.StringAttr(config["ir"]).value_bytes
        return ir.WalkResult.ADVANCE

    lowered.operation.walk(visit)
    return found


def functions(bytecode):
    """(name, Counter of operations) of each function of a module."""
    with mlir.make_ir_context() as context, ir.Location.unknown(context):
        dialects.dialect.register_dialect(context)
        made = []
        for function in ir.Module.parse(bytecode).body.operations:
            counts = Counter(
                op.name for block in function.operation.regions[0] for op in branches._nested(block)
            )
            made.append((ir.StringAttr(function.operation.attributes["sym_name"]).value, counts))
    return made


@pytest.fixture(scope="module")
def apart_and_whole():
    """The decode kernel for heads of four formats, as it is, and as jax would lower it."""
    apart = modules("pallas-7x")["decode_attention"]
    branches.SERVED = False
    jax.clear_caches()  # or the lowering is the one just made
    try:
        return functions(apart), functions(modules("pallas-7x")["decode_attention"])
    finally:
        branches.SERVED = True
        jax.clear_caches()


def test_each_format_is_a_function(apart_and_whole):
    (kernel, *others), _ = apart_and_whole
    assert [name for name, _ in others] == [f"branch_{i}" for i in range(len(others))]
    assert kernel[1]["tt.call"] == len(others)
    assert len(others) == 5  # the tokens in full precision, and four formats
    assert all(counts[LOOP] for _, counts in others[1:])
    assert LOOP not in kernel[1]
    assert all(sum(counts.values()) >= branches.LARGE for _, counts in others)


def test_nothing_is_lost(apart_and_whole):
    """Each operation is in one function; constants are made where they are used."""
    apart, ((_, whole),) = apart_and_whole
    total = sum((counts for _, counts in apart), Counter())
    calls = total.pop("tt.call")
    assert total.pop("tt.return") == whole.pop("tt.return") + calls
    assert total.pop("arith.constant") >= whole.pop("arith.constant") - total["arith.addi"]
    assert total == whole


def test_torch_gets_one_function():
    """Its Triton takes the first function of a module for the kernel."""
    jax.clear_caches()
    with triton.loading_again():
        found = functions(modules("pallas-7x")["decode_attention"])
    jax.clear_caches()
    assert len(found) == 1


@pytest.mark.parametrize("name", ("attend 4x4 32x4096", "formats step"))
def test_short_kernels_are_whole(name):
    ((_, counts),) = functions(modules(name)["decode_attention"])
    assert "tt.call" not in counts
