"""Queries into the rotated space, RoPE on the way."""

from pallas_kernels.primitives.rotation import Rotation
from pallas_kernels.rope.call import rope_and_rotate, rotate

__all__ = ["Rotation", "rope_and_rotate", "rotate"]
