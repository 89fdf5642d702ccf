"""One vector times a matrix, which is read at the speed of memory."""

from pallas_kernels.product.call import matrix_vector

__all__ = ["matrix_vector"]
