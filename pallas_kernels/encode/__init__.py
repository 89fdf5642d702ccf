"""From full-precision keys and values to packed blocks, in one pass: one read, one write."""

from pallas_kernels.encode.call import encode
from pallas_kernels.encode.pool import Group, Pool
from pallas_kernels.primitives.blocks import PAGE_TOKENS
from pallas_kernels.primitives.quantize import Code
from pallas_kernels.primitives.rotation import Rotation

__all__ = ["PAGE_TOKENS", "Code", "Group", "Pool", "Rotation", "encode"]
