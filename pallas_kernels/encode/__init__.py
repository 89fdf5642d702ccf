"""From full-precision keys and values to packed blocks, in one pass: one read, one write."""

from pallas_kernels.encode.call import encode
from pallas_kernels.encode.pool import GroupOperand, Pool, PreRopeOperand
from pallas_kernels.primitives.quantize import CodeOperand
from pallas_kernels.primitives.rotation import RotationOperand

__all__ = [
    "CodeOperand",
    "GroupOperand",
    "Pool",
    "PreRopeOperand",
    "RotationOperand",
    "encode",
]
