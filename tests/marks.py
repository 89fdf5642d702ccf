"""Marks of cases that need a GPU; jax warns at each lowering of a Triton kernel."""

import jax
import pytest

from pallas_kernels.primitives.triton import DEPRECATION

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
    pytest.mark.filterwarnings(f"ignore:{DEPRECATION}:DeprecationWarning"),
]
