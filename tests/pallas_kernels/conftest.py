"""jax warns at each lowering of a Triton kernel; here warnings are errors."""

import pytest

from pallas_kernels.primitives.triton import DEPRECATION


def pytest_collection_modifyitems(items):
    """For the tests of the library too: whatever calls the kernel on a GPU lowers it."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings(f"ignore:{DEPRECATION}:DeprecationWarning"))
