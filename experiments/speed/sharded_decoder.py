"""A decoder on a mesh: its loop compiled ahead, timed, and taken apart by kind of kernel."""

import gc
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from turboquant_jax.cache import CacheConfig
from turboquant_jax.models import dense, timing
from turboquant_jax.models import sharding as model_sharding
from turboquant_jax.models.config import LlamaConfig
from turboquant_jax.models.dense import DENSE
from turboquant_jax.models.generate import Past
from turboquant_jax.models.model import random_model
from turboquant_jax.models.past import COMPRESSED, on_mesh
from turboquant_jax.models.sharding import make_past, placed

_IN_GRAPHS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,COLLECTIVES"
_KERNELS = "xla_gpu_experimental_use_collective_kernels"
_NCCL = {
    "xla_gpu_enable_command_buffer": _IN_GRAPHS,
    "xla_gpu_unsupported_use_all_reduce_one_shot_kernel": False,
    _KERNELS: "",
}
COMPILERS: dict[str, dict[str, Any]] = {
    "": {},
    "graphs": {"xla_gpu_enable_command_buffer": _IN_GRAPHS},
    "kernels": {"xla_gpu_unsupported_use_all_reduce_one_shot_kernel": True},
    "gather": {_KERNELS: "COLLECTIVE_KERNEL_ALL_REDUCE,COLLECTIVE_KERNEL_ALL_GATHER"},
    "nccl": _NCCL,
    "symmetric": _NCCL | {"xla_gpu_experimental_enable_nccl_symmetric_buffers": True},
    "launches": {"xla_gpu_enable_command_buffer": ""},
}
"""XLA as it is; asked for collectives in CUDA graphs; for its own kernel of small sums; for its own
kernels of sums and gathers; for NCCL's sums in CUDA graphs; the same with NCCL's symmetric memory;
for no graphs.
"""

KINDS = {
    "collectives": ("nccl", "all_reduce", "all-reduce", "all_gather", "all-gather", "pmin"),
    "attention": ("attention", "combine", "rope", "encode", "flash", "fmha"),
    "products": ("gemm", "dot", "cutlass", "nvjet", "cublas", "splitk"),
}
"""Kinds of kernels by what their names contain, the first that fits; others are "other"."""


@dataclass(frozen=True)
class Decoder:
    """Greedy decoding of random weights with a past that is filled, compressed or dense (None).

    Attributes:
      mesh: None for one device, which runs what it runs without a mesh.
      capacity: tokens that a sequence has room for, the steps of a loop among them.
    """

    llama: LlamaConfig
    cache: CacheConfig | None
    mesh: Mesh | None
    batch: int
    tokens: int
    steps: int
    compiler: str = ""

    @property
    def capacity(self) -> int:
        """Room of a sequence."""
        return self.tokens + self.steps + 1

    @cached_property
    def past(self) -> Past[Any]:
        """How the decoder uses its past."""
        if self.cache is None:
            return DENSE if self.mesh is None else dense.on_mesh(self.mesh)
        return COMPRESSED if self.mesh is None else on_mesh(self.mesh)

    def make_past(self) -> Any:
        """The past, filled; on a mesh no device ever has all of it."""
        sizes = self.batch, self.tokens, self.capacity
        if self.cache is None:
            return make_past(partial(timing.filled_dense, self.llama, *sizes), self.mesh)
        return timing.filled_cache(self.cache, *sizes, mesh=self.mesh)

    def make_model(self) -> Any:
        """The weights."""
        if self.mesh is None:
            return random_model(self.llama, 0, stacked=False)
        return model_sharding.random_model(self.llama, 0, self.mesh)

    def compiled(self) -> timing.CompiledDecode:
        """The loop, compiled for shapes alone: nothing is allocated."""
        model = jax.eval_shape(partial(random_model, self.llama, 0, stacked=False))
        if self.mesh is not None:
            model = placed(model, model_sharding.shardings(model, self.mesh))
        options = COMPILERS[self.compiler]
        return timing.compile_decode(
            model, self.make_past, self.past, self.steps, self.mesh, options
        )

    def loop(self, model: Any, compiled: timing.CompiledDecode) -> "Loop":
        """The loop with weights and a past on the devices."""
        return Loop(model, self.make_past, self.past, self.steps, compiled, self.mesh)


class Loop(timing.DecodeLoop):
    """Steps of decoding, timed, and taken apart."""

    def median(self, repeats: int) -> float:
        """Seconds of a step, the median of loops; the first one does not count."""
        return statistics.median([self.seconds() for _ in range(repeats + 1)][1:])

    def parts(self) -> dict[str, float]:
        """Seconds of a step that the devices spend in each kind of kernel, their mean.

        A sum over devices counts the time that it waits for the last of them.
        """
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = options.host_tracer_level = 0
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder, profiler_options=options):
                self.seconds()
            (trace,) = Path(folder).rglob("*.xplane.pb")
            found, devices = _kernels(ProfileData.from_file(str(trace)))
        for name, seconds in sorted(found.items(), key=lambda item: -item[1])[:25]:
            each = 1e6 * seconds / devices / self.steps
            print(f"  {each:9.1f} us a step  {name[:110]}", flush=True)
        parts: dict[str, float] = defaultdict(float)
        for name, seconds in found.items():
            parts[kind_of(name)] += seconds / devices / self.steps
        return dict(parts)


def kind_of(kernel: str) -> str:
    """Which of `KINDS` a kernel is, by its name."""
    lower = kernel.lower()
    return next((k for k, words in KINDS.items() if any(w in lower for w in words)), "other")


def _kernels(data: ProfileData) -> tuple[dict[str, float], int]:
    """Seconds of every kernel on all devices together, and of how many devices there are any."""
    found: dict[str, float] = defaultdict(float)
    devices = 0
    for plane in data.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        events = list(_events(plane))
        devices += bool(events)
        for name, seconds in events:
            found[name] += seconds
    if not devices:
        raise ValueError("got a trace without kernels, expected a GPU")
    return found, devices


def _events(plane: Any) -> Iterator[tuple[str, float]]:
    for line in plane.lines:
        if line.name.startswith("Stream"):
            yield from ((event.name, event.duration_ns / 1e9) for event in line.events)


def replicated_shapes(shapes: Any, mesh: Mesh) -> Any:
    """Shapes of what every device has."""
    return placed(shapes, jax.tree.map(lambda _: NamedSharding(mesh, P()), shapes))


def collect() -> None:
    """Give the devices' memory back between two cases."""
    gc.collect()
    jax.clear_caches()
