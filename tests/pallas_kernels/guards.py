"""Digests of the Triton IR of every lowering case, made without a GPU.

python -m tests.pallas_kernels.guards --write    # after a change of a kernel that was meant
"""

import hashlib
import json
import re
import sys
from pathlib import Path

import jax

FILE = Path(__file__).with_name("guards.json")


def digests(text: str) -> list[str]:
    """Of each Triton kernel of a StableHLO text: its grid, warps and stages, and its IR.

    Printed from the bytecode without locations and with the kernel's name left out.
    """
    from jax._src.interpreters import mlir  # no public way to the dialect
    from jax._src.lib.mlir import ir
    from jax._src.lib.triton import dialect

    found = []
    for config in re.findall(r"mhlo\.backend_config = \{(.*?ir = \"(?:[^\"\\]|\\.)*\".*?)\}", text):
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


def main() -> None:
    from tests.pallas_kernels import cases

    found = {}
    for name, make in cases.MAKERS.items():
        case = make()
        found[name] = digests(cases.lower(case.function, *case.arguments).as_text())
    FILE.write_text(json.dumps({"jax": jax.__version__, "ir": found}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    main()
