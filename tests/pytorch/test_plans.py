"""Launch plans: what is in them, where they come from, and what Triton makes of them."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from tests.pytorch.skip import torch
from turboquant_jax.pytorch import binary as binaries
from turboquant_jax.pytorch import operands, plan, plan_jax, plan_store, runner

triton = pytest.importorskip("triton", reason="needs the Triton that torch ships for GPUs")
from tests.pytorch import calls  # noqa: E402
from turboquant_jax.pytorch import triton_compile  # noqa: E402

POINTERS = {
    "f32": "float32", "bf16": "bfloat16", "i8": ("uint8", "int8"), "i32": ("int32", "uint32"),
}  # fmt: skip
# Where none would be better: the first kernel wants 64 registers more, the second would take twice
# the warps to be spared 8 bytes.
SPILLED = {
    ("mean before RoPE 4", 128, "encode", 80),
    ("scalar 8", 128, "decode_attention", 80),
}


@pytest.fixture(scope="module")
def recorded():
    """Calls of a step and a commit, with a mean of stored keys, on a cache of 4 bits."""
    return calls.recorded(calls.config_of("scalar 4", 64), heads=8)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache on disk and a process without plans."""
    monkeypatch.setenv("TURBOQUANT_JAX_PLANS", str(tmp_path / "plans"))
    monkeypatch.setattr(plan_store, "_bundles", [])
    monkeypatch.setattr(plan_store, "_used", {})
    return tmp_path


@pytest.fixture(scope="module")
def attention(recorded):
    return plan_store._made(*calls.flat("decode_attention", recorded["decode_attention"]))


def test_versions():
    """What the private interfaces of jax and Triton were read of; others are refused in words."""
    assert plan_jax.SERVED == ("0.10", "0.11", "0.12")
    assert triton_compile.SERVED == ("3.5", "3.6", "3.7")
    assert plan_jax.served(jax.__version__)
    assert triton_compile.served(triton.__version__)
    for module in (plan_jax, triton_compile):
        assert not module.served("4.0.1")
        assert not module.served("0.9.2")


def test_another_release_is_refused(monkeypatch, attention):
    kernel = attention.kernels[0]
    monkeypatch.setattr(triton, "__version__", "3.1.0")
    with pytest.raises(NotImplementedError, match=r"triton: got 3.1.0, expected 3.5, 3.6, 3.7"):
        triton_compile.compile_kernel(kernel.ttir, kernel.warps, kernel.stages, 91)
    monkeypatch.setattr(jax, "__version__", "0.9.0")
    with pytest.raises(NotImplementedError, match=r"jax: got 0.9.0, launch plans are made by 0.10"):
        plan_jax.make_plan(None, (), ())
    monkeypatch.undo()
    with pytest.raises(NotImplementedError, match="GPU: got sm_75, expected sm_80 or newer"):
        triton_compile.compile_kernel(kernel.ttir, kernel.warps, kernel.stages, 75)


def test_a_plan_names_the_memory_of_every_pointer(attention):
    """By types; the newest token goes into the tensors that the call is given, in place."""
    assert [kernel.name for kernel in attention.kernels] == ["decode_attention", "decode_combine"]
    for kernel in attention.kernels:
        (signature,) = re.findall(r"tt\.func public @\w+\((.*?)\) \{", kernel.ttir, re.DOTALL)
        pointers = re.findall(r"!tt\.ptr<(\w+)> \{tt\.divisibility = (\d+)", signature)
        buffers = [attention.buffers[i] for i in kernel.arguments]
        for (element, divisor), buffer in zip(pointers, buffers, strict=True):
            assert buffer.dtype in POINTERS[element]
            assert runner.ALIGNMENT % int(divisor) == 0
    first, second = attention.kernels
    for buffer in attention.of_kind("written"):
        assert first.arguments.count(attention.buffers.index(buffer)) == 2
    assert len(attention.of_kind("written")) == 4  # sinks and window
    scratch = [i for i, buffer in enumerate(attention.buffers) if buffer.kind == "scratch"]
    assert set(scratch) <= set(first.arguments) & set(second.arguments)
    output, lse = attention.of_kind("output")
    assert (output.shape, output.dtype, lse.shape) == ((3, 8, 64), "bfloat16", (3, 8))


def test_a_plan_is_the_same_for_every_gpu(attention, monkeypatch, recorded):
    monkeypatch.setattr(plan_jax, "DEVICE_KIND", "NVIDIA H100 80GB HBM3")
    again = plan_store._made(*calls.flat("decode_attention", recorded["decode_attention"]))
    assert again == attention


def test_constants_hold_their_bytes():
    held = plan.constant(3, jax.numpy.asarray([[1.5, -2.0]], jax.numpy.bfloat16).__array__())
    assert (held.dtype, held.shape, held.index) == ("bfloat16", (1, 2), 3)
    values = torch.frombuffer(bytearray(held.bytes()), dtype=torch.bfloat16)
    assert values.tolist() == [1.5, -2.0]


def test_a_plan_survives_as_text(attention):
    text = plan.dumps(attention)
    assert plan.loads(text) == attention
    for damaged, message in (
        (text[:-2], "got a text that is none"),
        ("[]", "got a text that is none"),
        (json.dumps(json.loads(text) | {"format": 0}), "format of a plan: got 0, expected 1"),
        (json.dumps({"format": 1, "jax": "0.11"}), "got wrong fields"),
    ):
        with pytest.raises(ValueError, match=message):
            plan.loads(damaged)


def test_what_is_more_than_kernels_is_refused(recorded):
    """A row of its own would be put beside the layer's number, on the device, at each call."""
    arguments, named = recorded["decode_attention"]
    blocks = operands.PagedBlocks(
        **arguments[1].fields | {"row": torch.empty((), dtype=torch.int32, device="meta")}
    )
    given = (arguments[0], blocks, *arguments[2:]), named
    with pytest.raises(NotImplementedError, match=r"got `\w+` of int32\[.*\] between the kernels"):
        plan_store._made(*calls.flat("decode_attention", given))
    with pytest.raises(ValueError, match="overwritten, expected it among `written`"):
        name, spec, read, written = calls.flat("decode_attention", recorded["decode_attention"])
        moved = re.sub(r'"written": (\d+)', lambda m: f'"read": {len(read) + int(m[1])}', spec)
        plan_store._made(name, moved, (*read, *written), ())


def test_plans_are_kept_and_made_anew_for_another_jax(folder, monkeypatch, recorded):
    call = calls.flat("rotate", recorded["rotate"])
    made = plan_store.plan_of(*call)
    (file,) = (folder / "plans").iterdir()  # and nothing half written
    assert file.name == f"{plan_store.digest(*call)}.json"
    asked = []
    monkeypatch.setattr(plan_store, "_made", lambda *call: asked.append(call) or made)
    assert plan_store.plan_of(*call) == made
    assert not asked
    for text in (plan.dumps(replace(made, jax="0.11.0")), "damaged"):
        file.write_text(text)
        assert plan_store.plan_of(*call) == made
    assert len(asked) == 2
    other = [*call[:2], ((call[2][0][0], "float16"), *call[2][1:]), call[3]]
    assert plan_store.digest(*other) != plan_store.digest(*call)
    monkeypatch.setattr(plan_store, "source_digest", lambda: "of other kernels")
    assert f"{plan_store.digest(*call)}.json" != file.name


def test_a_file_is_written_whole_or_not_at_all(folder):
    path = folder / "some.json"
    path.write_text("before")
    with pytest.raises(KeyError), plan_store._replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "before"
    assert [x.name for x in folder.iterdir()] == ["some.json"]


WITHOUT_JAX = """
import sys
sys.modules["jax"] = sys.modules["triton"] = None  # any import of them fails
from turboquant_jax.pytorch import plan_store
call = {call!r}
if {bundle!r}:
    plan_store.use({bundle!r})
try:
    plan = plan_store.plan_of(*call)
except ImportError as error:
    print(error)
else:
    (kernel,) = plan.kernels
    print(plan_store.code_of(kernel, 90).name)
print(sorted(x for x in sys.modules if x.startswith("jax") and sys.modules[x] is not None))
"""


def test_with_plans_at_hand_neither_jax_nor_triton_is_imported(folder, recorded):
    call = calls.flat("rotate", recorded["rotate"])
    (kernel,) = plan_store.plan_of(*call).kernels
    made = plan_store.code_of(kernel, 90)
    (held,) = (folder / "plans").glob("*.code.json")
    text = held.read_text()
    assert plan_store.code_of(kernel, 90) == made == binaries.loads(text)
    held.write_text(text[:-9])  # what is not whole is compiled anew
    assert plan_store.code_of(kernel, 90) == made and held.read_text() == text
    bundle = str(folder / "bundle.zip")
    plan_store.save(bundle)
    first = Path(bundle).read_bytes()
    plan_store.save(bundle)
    assert Path(bundle).read_bytes() == first
    empty = os.environ | {"TURBOQUANT_JAX_PLANS": str(folder / "empty")}
    for given, expected in (
        (bundle, "rotate_queries"),
        ("", "plan: got none for this call of rotate, expected one at hand, or jax to make it"),
    ):
        script = WITHOUT_JAX.format(call=call, bundle=given)
        done = subprocess.run(
            [sys.executable, "-c", script], env=empty, capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines() == [expected, "[]"]
    (folder / "none").write_text("text")
    with pytest.raises(ValueError, match="expected a file that `save` wrote"):
        plan_store.use(folder / "none")


def test_a_kernel_compiles_without_spills(attention):
    for kernel in attention.kernels:
        binary = triton_compile.compile_kernel(kernel.ttir, kernel.warps, kernel.stages, 90)
        assert binary.name == kernel.name
        assert binary.spilled == 0
        assert binary.pointers - len(kernel.arguments) in (0, 1, 2)  # scratch of Triton's
        assert binary.cubin[:4] == b"\x7fELF"


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", calls.FORMATS)
def test_every_plan_compiles_without_spills(name, head_dim, capability):
    found = calls.recorded(calls.config_of(name, head_dim), heads=8)
    spilled = set()
    for operator, given in found.items():
        for kernel in plan_store.plan_of(*calls.flat(operator, given)).kernels:
            binary = triton_compile.compile_kernel(
                kernel.ttir, kernel.warps, kernel.stages, capability
            )
            if binary.spilled:
                spilled.add((name, head_dim, kernel.name, capability))
    assert spilled == {x for x in SPILLED if x[:2] == (name, head_dim) and x[3] == capability}
