"""What the kernels compile to: Triton IR, registers, spills and copies, without a GPU.

After a change of a kernel that was meant, and `make guards`, which installs what this needs:

    PYTHONPATH=.venv/guards JAX_PLATFORMS=cpu python -m tests.pallas_kernels.guards --write
"""

import hashlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies

from tests.compiling import FULL

FILE = Path(__file__).with_name("guards.json")
TARGET = Path(__file__).with_name("h100.txtpb")
INSTALLED = all(importlib.util.find_spec(x) for x in ("jax_cuda13_plugin", "nvidia"))
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # no CUDA libraries are needed


def _configs(text: str) -> list[str]:
    """The Triton calls of a StableHLO text."""
    return re.findall(r"mhlo\.backend_config = \{(.*?ir = \"(?:[^\"\\]|\\.)*\".*?)\}", text)


def digests(text: str) -> list[str]:
    """Of each Triton kernel of a StableHLO text: its grid, warps and stages, and its IR.

    Printed from the bytecode without locations and with the kernel's name left out.
    """
    from jax._src.interpreters import mlir  # no public way to the dialect
    from jax._src.lib.mlir import ir
    from jax._src.lib.triton import dialect

    found = []
    for config in _configs(text):
        (packed,) = re.findall(r'ir = "((?:[^"\\]|\\.)*)"', config)
        launch = re.findall(r"(grid_[xyz]|num_warps|num_stages) = (\d+)", config)
        code = re.sub(
            rb"\\([0-9A-Fa-f]{2}|.)",
            lambda m: bytes([int(m[1], 16)]) if len(m[1]) == 2 else m[1],
            packed.encode("latin1"),
        )
        with mlir.make_ir_context() as context:
            dialect.register_dialect(context)
            printed = str(ir.Module.parse(code))
        printed = re.sub(r"@\w+", "@kernel", printed)
        found.append(hashlib.sha256(f"{sorted(launch)}\n{printed}".encode()).hexdigest())
    return found


def assert_lowered(name: str, case, text: str) -> None:
    """The kernels are there; on the recorded jax, their Triton IR is the recorded one."""
    assert all(kernel in text for kernel in case.kernels), name
    assert not any(kernel in text for kernel in case.absent), name
    recorded = json.loads(FILE.read_text())
    if jax.__version__ == recorded["jax"]:
        assert digests(text) == recorded["ir"][name], name


def lower_for_h100(function, *arguments, donate: tuple[int, ...] = ()):
    """For `compile_for_h100`; `cases.lower` lowers for any GPU."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology="1x1x1", target_config=TARGET.read_text()
    )
    mesh = topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("x",))
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), arguments
    )
    traced = jax.jit(lambda *a: function(*a), donate_argnums=donate)
    if not hasattr(jax.sharding, "AbstractDevice"):
        return traced.lower(*arguments)
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        return traced.lower(*arguments)


def compile_for_h100(lowered, dump: str = ""):
    """XLA's whole GPU pipeline; `dump` is a folder for what it wrote on the way."""
    options = FULL | {"xla_gpu_autotune_level": "0"}  # no device to tune on
    options |= {"xla_dump_to": dump} if dump else {}
    return lowered.compile(compiler_options=options)


def _ptxas(*options) -> subprocess.CompletedProcess:
    (root,) = importlib.util.find_spec("nvidia.cu13").submodule_search_locations
    command = [Path(root) / "bin" / "ptxas", *options]
    return subprocess.run(command, check=True, capture_output=True, text=True)


def toolchain() -> dict[str, str]:
    """What decides, beside its IR, what a kernel compiles to: jax's Triton, and ptxas."""
    release = re.search(r"V[\d.]+", _ptxas("--version").stdout)[0]
    return {"jax": jax.__version__, "assembler": release}


def resources(lowered) -> dict[str, list[int]]:
    """[registers a thread, bytes of spills] of each Triton kernel, as ptxas says.

    Two calls of a kernel in one program are `encode` and `encode__1`.
    """
    kernels = {re.search(r'\bname = "(\w+)"', x)[1] for x in _configs(lowered.as_text())}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        compile_for_h100(lowered, dump=folder)
        for ptx in Path(folder).glob("*.ptx"):
            if ".entry" not in ptx.read_text():
                continue
            said = _ptxas("-v", "-arch=sm_90a", "-o", os.devnull, ptx).stderr
            for name, stores, loads, registers in re.findall(
                r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, "
                r"(\d+) bytes spill loads.*?Used (\d+) registers",
                said,
                re.DOTALL,
            ):
                if re.sub(r"__\d+$", "", name) in kernels:
                    found[name] = [int(registers), int(stores) + int(loads)]
    return dict(sorted(found.items()))


def copies(compiled, least: int) -> list[str]:
    """Copies of `least` bytes or more in an optimized module."""
    found = []
    for line in compiled.as_text().splitlines():
        for kind, dims in re.findall(r"= \(?(\w+)\[([\d,]*)\]\S* copy(?:-start)?\(", line):
            bits = 8 if kind == "pred" else int(re.sub(r"\D", "", kind))
            if math.prod(int(d) for d in dims.split(",") if d) * bits // 8 >= least:
                found.append(line.strip())
    return found


def smallest_stored(state) -> int:
    """Bytes of the smallest array of a cache's pool or window."""
    leaves = jax.tree.leaves(([part.pool for part in state.parts], state.window))
    return min(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in leaves)


def main() -> None:
    from tests.pallas_kernels import cases

    recorded = {**toolchain(), "ir": {}, "ptxas": {}}
    for name, make in cases.MAKERS.items():
        case = make()
        recorded["ir"][name] = digests(cases.lower(case.function, *case.arguments).as_text())
        recorded["ptxas"][name] = resources(lower_for_h100(case.function, *case.arguments))
        print(name, recorded["ptxas"][name], flush=True)
    FILE.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    main()
