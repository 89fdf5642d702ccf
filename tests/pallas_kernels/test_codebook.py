"""What a codebook may hold."""

import pytest

from pallas_kernels.codebook import Codebook, level_limits


@pytest.mark.parametrize("bits", range(1, 9))
def test_limits(bits):
    """The limits themselves are accepted, one more is not."""
    low, high = level_limits(bits)
    rest = (0,) * (2**bits - 2)
    Codebook(bits, (low, high, *rest), 1.0)
    for bad in ((low - 1, high), (low, high + 1), (0.5, high)):
        with pytest.raises(ValueError, match="expected integers"):
            Codebook(bits, (*bad, *rest), 1.0)


def test_counts():
    """2**bits levels for 1 to 8 bits."""
    with pytest.raises(ValueError, match="expected 1 to 8"):
        Codebook(9, (0,) * 512, 1.0)
    with pytest.raises(ValueError, match="got 3 levels"):
        Codebook(2, (0, 1, 2), 1.0)
