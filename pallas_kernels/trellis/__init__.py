"""From vectors to the codes of an 8-state trellis."""

from pallas_kernels.trellis.call import encode

__all__ = ["encode"]
