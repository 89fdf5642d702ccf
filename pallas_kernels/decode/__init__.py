"""From packed blocks back to vectors, in the rotated space: for what reads them more than once."""

from pallas_kernels.decode.call import decode
from pallas_kernels.primitives.blocks import BlocksOperand
from pallas_kernels.primitives.codebook import CodebookOperand

__all__ = ["BlocksOperand", "CodebookOperand", "decode"]
