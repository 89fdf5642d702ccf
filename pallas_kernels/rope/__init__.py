"""Queries into the rotated space, RoPE on the way."""

from pallas_kernels.primitives.rotation import RotationOperand
from pallas_kernels.rope.call import rope_and_rotate, rotate

__all__ = ["RotationOperand", "rope_and_rotate", "rotate"]
