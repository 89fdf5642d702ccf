"""Where plans and their machine code come from: bundles that were shipped, the cache on disk, or a
jax that makes the plan and a Triton that compiles it.

A plan is named by a digest of its call, the shapes and dtypes of its tensors, and the source of the
kernels. The cache is `$TURBOQUANT_JAX_PLANS`, else `turboquant-jax/plans` in the user's cache; a
plan in it that another jax made is made anew. Plans of a bundle (`use`) are taken from any jax, so
that with all plans at hand jax is never imported. Code is named by what was compiled, for which GPU
and by which Triton.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from turboquant_jax.pytorch import binary
from turboquant_jax.pytorch import plan as plans
from turboquant_jax.pytorch.binary import Binary
from turboquant_jax.pytorch.plan import Plan

ROOT = Path(__file__).parents[2]
# What decides which Triton IR a call becomes.
SOURCES = (
    "pallas_kernels/**/*.py",
    "turboquant_jax/attention/triton.py",
    "turboquant_jax/cache/config.py",
    "turboquant_jax/cache/layout.py",
    "turboquant_jax/pytorch/plan*.py",
)

Shapes = Sequence[tuple[tuple[int, ...], str]]

_bundles: list[Path] = []
_used: dict[str, str] = {}


def use(path: str | Path) -> None:
    """Takes plans from a file that `save` wrote; those of the last one first.

    Raises ValueError if it is none.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f"plans: got {path}, expected a file that `save` wrote")
    _bundles.insert(0, Path(path))


def save(path: str | Path) -> None:
    """Writes all plans and code that this process has used into one file, for `use` elsewhere."""
    with _replacing(Path(path)) as temporary, zipfile.ZipFile(temporary, "w") as bundle:
        for name, text in sorted(_used.items()):
            # no time of writing: the same plans are the same file
            bundle.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED)


def plan_of(name: str, spec: str, read: Shapes, written: Shapes) -> Plan:
    """The plan of a call (`operands.flatten`) of tensors known by shapes and dtypes.

    Raises what is wrong with the call as the JAX kernels say it, and ImportError if jax would have
    to make it and is not installed.
    """
    file = f"{digest(name, spec, read, written)}.json"
    plan = _bundled_plan(file) or _cached_plan(file)
    if plan is None:
        plan = _made(name, spec, read, written)
        _keep(file, plans.dumps(plan))
    _used[file] = plans.dumps(plan)
    return plan


def code_of(kernel: plans.Kernel, capability: int) -> Binary:
    """The machine code of a kernel for a compute capability; errors are those of the compiler."""
    what = [kernel.ttir, kernel.warps, kernel.stages, capability]
    file = f"{_sha([binary.FORMAT, _version('triton'), _compiler_digest(), *what])}.code.json"
    text = _bundled(file) or _cached(file)
    if text is None or (found := binary.loads(text)) is None:
        from turboquant_jax.pytorch import triton_compile  # imports triton

        found = triton_compile.compile_kernel(*what)
        text = binary.dumps(found)
        _keep(file, text)
    _used[file] = text
    return found


def digest(name: str, spec: str, read: Shapes, written: Shapes) -> str:
    """What names a plan."""
    return _sha([plans.FORMAT, source_digest(), name, spec, list(read), list(written)])


def _sha(facts: list) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


@functools.cache
def _compiler_digest() -> str:
    return hashlib.sha256((Path(__file__).parent / "triton_compile.py").read_bytes()).hexdigest()


@functools.cache
def source_digest() -> str:
    """Of the source of the kernels."""
    found = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            found.update(f"{path.relative_to(ROOT).as_posix()}\n".encode())
            found.update(path.read_bytes())
    return found.hexdigest()


def folder() -> Path:
    """The cache on disk."""
    if given := os.environ.get("TURBOQUANT_JAX_PLANS"):
        return Path(given)
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "turboquant-jax" / "plans"


def _bundled(file: str) -> str | None:
    for path in _bundles:
        with zipfile.ZipFile(path) as bundle:
            if file in bundle.namelist():
                return bundle.read(file).decode("utf-8")
    return None


def _cached(file: str) -> str | None:
    try:
        return (folder() / file).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _keep(file: str, text: str) -> None:
    folder().mkdir(parents=True, exist_ok=True)
    with _replacing(folder() / file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _bundled_plan(file: str) -> Plan | None:
    text = _bundled(file)
    return None if text is None else plans.loads(text)


def _cached_plan(file: str) -> Plan | None:
    """If it is whole, and made by the jax that is installed, if one is."""
    try:
        plan = plans.loads(_cached(file) or "")
    except ValueError:
        return None
    return plan if _version("jax") in (None, plan.jax) else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _made(name: str, spec: str, read: Shapes, written: Shapes) -> Plan:
    if "jax" not in sys.modules:  # else it would take the GPU's memory from torch
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        import jax
    except ImportError as error:
        raise ImportError(
            f"plan: got none for this call of {name}, expected one at hand, or jax to make it"
        ) from error
    from turboquant_jax.pytorch.plan_functions import function_of
    from turboquant_jax.pytorch.plan_jax import make_plan

    arrays = [[jax.ShapeDtypeStruct(*x) for x in side] for side in (read, written)]
    return make_plan(function_of(name, spec), *arrays)


class _replacing:
    """A temporary file beside a path, which it becomes at the end: readers see all or nothing."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> Path:
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name)
        os.close(handle)
        self.temporary = Path(name)
        return self.temporary

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink()
