"""What a codebook may hold."""

import pytest

from pallas_kernels.primitives.codebook import CodebookOperand, level_limits


@pytest.mark.parametrize("bits", range(1, 9))
def test_limits(bits):
    """The limits themselves are accepted, one more is not."""
    low, high = level_limits(bits)
    rest = (0,) * (2**bits - 2)
    CodebookOperand(bits, (low, high, *rest), 1.0)
    for bad in ((low - 1, high), (low, high + 1), (0.5, high)):
        with pytest.raises(ValueError, match="expected integers"):
            CodebookOperand(bits, (*bad, *rest), 1.0)


def test_counts():
    """2**bits levels for 1 to 8 bits."""
    with pytest.raises(ValueError, match="expected 1 to 8"):
        CodebookOperand(9, (0,) * 512, 1.0)
    with pytest.raises(ValueError, match="levels: got 3 "):
        CodebookOperand(2, (0, 1, 2), 1.0)


def test_trellis():
    """Twice the levels and a plane for the path; at 3 bits the lower half is negative."""
    widths = [CodebookOperand(b, (0,) * 2 ** (b + 1), 1.0, "trellis").widths for b in (1, 2)]
    assert widths == [(1,), (1, 1)]
    halves = (-128,) * 8 + (126,) * 8
    assert CodebookOperand(3, halves, 1.0, "trellis").widths == (2, 1)
    assert CodebookOperand(4, (8191,) * 32, 1.0, "trellis").widths == (2, 1, 1)
    with pytest.raises(ValueError, match="number 8 of a 3-bit trellis, expected none below 0"):
        CodebookOperand(3, (-1,) * 16, 1.0, "trellis")
    with pytest.raises(ValueError, match="levels: got 16 for 4 trellis bits"):
        CodebookOperand(4, halves, 1.0, "trellis")
    with pytest.raises(ValueError, match="1 to 4 of a trellis"):
        CodebookOperand(5, (0,) * 64, 1.0, "trellis")
