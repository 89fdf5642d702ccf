"""A program of its own: a call by the JAX kernels on the GPU, beside which torch holds no memory.

python jax_on_gpu.py call.npz result.npz
"""

import sys

import jax
import ml_dtypes
import numpy as np

from turboquant_jax.pytorch.plan_functions import function_of


def main() -> None:
    if jax.default_backend() != "gpu":
        sys.exit("jax: got no GPU, expected one")
    with np.load(sys.argv[1]) as given:
        held = {name: given[name] for name in given.files}
    name, spec = str(held["name"]), str(held["spec"])
    read, written = (
        [typed(held[f"{side}{i}"], str(held[f"{side}{i}_type"])) for i in range(held[side])]
        for side in ("read", "written")
    )
    outputs, stored = jax.jit(function_of(name, spec))(read, written)
    found = [x for x in (*stored, *outputs)]
    np.savez(
        sys.argv[2],
        **{str(i): plain(np.asarray(x)) for i, x in enumerate(found) if x is not None},
    )


def typed(array: np.ndarray, dtype: str) -> np.ndarray:
    return array.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else array


def plain(array: np.ndarray) -> np.ndarray:
    """Numbers as they are, but bfloat16, which files do not know, as float32."""
    return array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array


if __name__ == "__main__":
    main()
