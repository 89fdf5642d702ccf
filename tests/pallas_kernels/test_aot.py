"""Of what XLA makes of a decoding step for an H100: nothing as large as the pool is copied."""

import pytest

from tests.pallas_kernels import aot, cases


@pytest.mark.skipif(not aot.INSTALLED, reason="needs jax-cuda13-plugin, its PJRT and ptxas")
def test_a_step_copies_nothing_stored():
    """With a donated cache; one that is kept is copied, which shows that copies are seen."""
    case = cases.of_cache(4, 128, "hadamard", "bfloat16")["step"]
    least = aot.smallest_stored(case.arguments[0])

    def copies(donate):
        compiled = aot.compile_for_h100(case.function, *case.arguments, donate=donate)
        return aot.copies(compiled, least)

    assert not copies((0,))
    assert copies(())
