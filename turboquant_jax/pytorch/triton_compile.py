"""Triton IR to GPU code: the only module that touches the Triton that torch ships.

It compiles on any machine, for any target, and keeps what it made in its own cache on disk. Private
are the way from IR text to a compiled kernel and the names in its metadata; so releases are named
(`SERVED`).
"""

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

from turboquant_jax.pytorch.binary import Binary

# Releases whose code is tested.
SERVED = ("3.5", "3.6", "3.7")
OLDEST = 80
FEW = 64
"""Bytes that a thread may put aside: less than that costs nothing beside the alternative."""


def served(version: str) -> bool:
    """Whether this Triton's code is tested."""
    return ".".join(version.split(".")[:2]) in SERVED


@functools.cache
def compile_kernel(ttir: str, warps: int, stages: int, capability: int) -> Binary:
    """The code for a compute capability, 90 for sm_90.

    Raises NotImplementedError for a Triton or a GPU that is not served.
    """
    if not served(triton.__version__):
        raise NotImplementedError(f"triton: got {triton.__version__}, expected {', '.join(SERVED)}")
    if capability < OLDEST:
        raise NotImplementedError(f"GPU: got sm_{capability}, expected sm_{OLDEST} or newer")
    target = GPUTarget("cuda", capability, 32)
    found: list[Binary] = []
    # Which text leaves more registers is chance. More warps have more of them, but a multiprocessor
    # then holds half as many programs: one that waits for memory takes three times as long.
    for simplify, count in ((True, warps), (False, warps), (True, 2 * warps)):
        if count > warps and found and min(x.spilled for x in found) <= FEW:
            break
        # as XLA compiles it: sums and products are fused where the kernel says so, and nowhere else
        options = {"num_warps": count, "num_stages": stages, "enable_fp_fusion": False}
        text = _simplified(ttir, target, options) if simplify else ttir
        binary = _compiled(text, target, options)
        if binary is None:
            continue
        found.append(binary)
        if not binary.spilled:
            return binary
    if not found:
        raise NotImplementedError(
            f"triton: {triton.__version__} gives the four bytes of a look-up to several threads"
        )
    return min(found, key=lambda binary: binary.spilled)


def _compiled(ttir: str, target: GPUTarget, options: dict[str, Any]) -> Binary | None:
    """The code, or None where it would be wrong: see `words_are_whole`."""
    with _file(ttir) as path:
        compiled = triton.compile(path, target=target, options=options)
    if not words_are_whole(compiled.asm["ttgir"]):
        return None
    metadata, ptx = compiled.metadata, compiled.asm["ptx"]
    if metadata.global_scratch_size:
        raise NotImplementedError("triton: got a kernel with scratch memory, expected none")
    (parameters,) = re.findall(r"\.entry\s+\w+\s*\((.*?)\)", ptx, re.DOTALL)
    pointers = len(re.findall(r"\.param\s+\.u64", parameters))
    cubin = compiled.asm["cubin"]
    return Binary(
        metadata.name, cubin, metadata.shared, pointers, _stack(cubin), options["num_warps"]
    )


def words_are_whole(ttgir: str) -> bool:
    """Whether every assembly of four bytes at a time has them of one row, in their order.

    It takes what follows in a thread's registers, whatever that is: which bytes a thread holds is
    the layout that Triton chose.
    """
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
    packed = r"elementwise_inline_asm .*packed_element = 4 .*-> tensor<([\dx]+)xi8, (#\w+)>"
    return all(
        _registers(layouts[name], [int(n) for n in shape.split("x")])[:2]
        == [[0] * shape.count("x") + [step] for step in (1, 2)]
        for shape, name in set(re.findall(packed, ttgir))
    )


def _registers(layout: str, shape: list[int]) -> list[list[int]]:
    """Where a thread's second register lies, its third, fifth and so on, of a layout."""

    def numbers(name: str) -> list[int]:
        (found,) = re.findall(rf"{name} = \[([\d, ]*)\]", layout)
        return [int(n) for n in found.split(", ")]

    if layout.startswith("#ttg.linear"):
        (found,) = re.findall(r"register = \[(.*?)\], lane", layout)
        return [[int(n) for n in place.split(", ")] for place in re.findall(r"\[(.*?)\]", found)]
    if not layout.startswith("#ttg.blocked"):
        return []  # of a product
    own, order = numbers("sizePerThread"), numbers("order")
    tile = [
        a * b * c
        for a, b, c in zip(own, numbers("threadsPerWarp"), numbers("warpsPerCTA"), strict=True)
    ]
    runs = [(axis, 1, min(own[axis], shape[axis])) for axis in order]
    runs += [(axis, tile[axis], shape[axis]) for axis in order]
    found = []
    for axis, step, stop in runs:
        while step < stop:
            found.append([step if i == axis else 0 for i in range(len(shape))])
            step *= 2
    return found


def _simplified(ttir: str, target: GPUTarget, options: dict[str, Any]) -> str:
    """Triton IR after Triton's passes over it.

    `triton.compile` takes a file for what these passes made, and skips them. Without them
    compiling the larger kernels takes twice as long, and some spill.
    """
    backend = make_backend(target)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    with _file(ttir) as path:
        module = ir.parse_mlir_module(path, context)
    module.context = context
    made = backend.make_ttir(module, {}, backend.parse_options(options), target.arch)
    # without the places in that file, whose name is another one every time: Triton keeps what it
    # compiled by its text
    return str(made.str_nodebug())


def _stack(cubin: bytes) -> int:
    """Bytes of stack of a thread: our kernels have none but for registers that are spilled."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    (found,) = re.findall(r"STACK:(\d+)", said)
    return int(found)


@contextlib.contextmanager
def _file(ttir: str) -> Iterator[str]:
    """The path of a file with this text, from which Triton takes its language."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ttir"
        path.write_text(ttir, encoding="utf-8")
        yield str(path)
