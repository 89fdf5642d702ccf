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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

# Releases whose code is tested.
SERVED = ("3.5", "3.6", "3.7")
OLDEST = 80


@dataclass(frozen=True)
class Binary:
    """GPU code of one kernel.

    Attributes:
      cubin: for `cuModuleLoadData`; `name` is that of the kernel in it.
      ptx: what it was assembled from.
      shared: bytes of dynamic shared memory.
      pointers: that the kernel takes: those of the plan, then scratch of Triton's, which is unused.
      spilled: bytes of registers that a thread puts aside.
      warps: of a program; twice those of the plan where one spills without.
    """

    name: str
    cubin: bytes
    ptx: str
    shared: int
    pointers: int
    spilled: int
    warps: int


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
    found = []
    # which text leaves more registers is chance; more warps have more of them
    for simplify, count in ((True, warps), (False, warps), (True, 2 * warps)):
        # as XLA compiles it: sums and products are fused where the kernel says so, and nowhere else
        options = {"num_warps": count, "num_stages": stages, "enable_fp_fusion": False}
        text = _simplified(ttir, target, options) if simplify else ttir
        found.append(_compiled(text, target, options))
        if not found[-1].spilled:
            return found[-1]
    return min(found, key=lambda binary: binary.spilled)


def _compiled(ttir: str, target: GPUTarget, options: dict[str, Any]) -> Binary:
    with _file(ttir) as path:
        compiled = triton.compile(path, target=target, options=options)
    metadata, ptx = compiled.metadata, compiled.asm["ptx"]
    if metadata.global_scratch_size:
        raise NotImplementedError("triton: got a kernel with scratch memory, expected none")
    (parameters,) = re.findall(r"\.entry\s+\w+\s*\((.*?)\)", ptx, re.DOTALL)
    pointers = len(re.findall(r"\.param\s+\.u64", parameters))
    cubin = compiled.asm["cubin"]
    return Binary(
        metadata.name, cubin, ptx, metadata.shared, pointers, _stack(cubin), options["num_warps"]
    )


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
    return str(backend.make_ttir(module, {}, backend.parse_options(options), target.arch))


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
