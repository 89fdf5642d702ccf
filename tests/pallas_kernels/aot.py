"""Compiling for an H100 without one. Needs jax's CUDA 13 plug-in, its PJRT and ptxas, no driver."""

import importlib.util
import math
import os
import re
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies

TARGET = Path(__file__).with_name("h100.txtpb")
INSTALLED = importlib.util.find_spec("jax_cuda13_plugin") is not None
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # no CUDA libraries are needed


def compile_for_h100(function, *arguments, donate: tuple[int, ...] = ()):
    """XLA's whole GPU pipeline."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology="1x1x1", target_config=TARGET.read_text()
    )
    mesh = topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("x",))
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), arguments
    )
    options = {"xla_gpu_autotune_level": "0"}  # no device to tune on
    traced = jax.jit(lambda *a: function(*a), donate_argnums=donate)
    if not hasattr(jax.sharding, "AbstractDevice"):
        return traced.lower(*arguments).compile(compiler_options=options)
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        return traced.lower(*arguments).compile(compiler_options=options)


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
    leaves = jax.tree.leaves((state.pool, state.window))
    return min(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in leaves)
