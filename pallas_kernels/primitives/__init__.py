"""Parts of kernels that know no operation, and `triton`, the one door to the backend."""
