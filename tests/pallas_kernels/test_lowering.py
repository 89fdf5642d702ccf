"""Every configuration that the benchmark names lowers for CUDA, on a machine without a GPU."""

import pytest

from tests.pallas_kernels import cases, guards


@pytest.mark.parametrize("name", cases.MAKERS)
def test_lowers_to_what_was_recorded(name):
    """The kernels are there; on the recorded version of jax, their Triton IR is the recorded one.

    After a change of a kernel that was meant: `python -m tests.pallas_kernels.guards --write`.
    """
    case = cases.MAKERS[name]()
    lowered = cases.lower(case.function, *case.arguments)
    guards.assert_lowered(name, case, lowered.as_text())
