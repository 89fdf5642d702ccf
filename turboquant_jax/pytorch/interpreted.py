"""The calls on CPU tensors: the JAX kernels, interpreted by jax. Exact and slow; needs jax."""

import functools
from collections.abc import Callable

import jax
import ml_dtypes
import numpy as np
import torch

from pallas_kernels.primitives import triton
from turboquant_jax.pytorch.plan_functions import function_of


def run(
    name: str,
    spec: str,
    read: list[torch.Tensor],
    written: list[torch.Tensor],
    outputs: list[torch.Tensor],
) -> None:
    """Runs a call, whose new arrays go into `outputs`."""
    function = _jitted(name, spec)
    cpu = jax.default_device(jax.devices("cpu")[0])
    with cpu, triton.interpreted(), triton.loading_again():  # what plans are made of
        made, stored = function([_array(x) for x in read], [_array(x) for x in written])
    for target, array in zip([*written, *outputs], [*stored, *made], strict=True):
        if array is not None:
            target.copy_(_tensor(array).reshape(target.shape))


@functools.cache
def _jitted(name: str, spec: str) -> Callable:
    return jax.jit(function_of(name, spec))


def _array(x: torch.Tensor) -> np.ndarray:
    """The same memory; numpy has no bfloat16 of its own."""
    if x.dtype == torch.bfloat16:
        return x.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.detach().numpy()


def _tensor(x: jax.Array) -> torch.Tensor:
    array = np.array(x)  # not the read-only memory of jax
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
