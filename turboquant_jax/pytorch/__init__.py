"""The same kernels and the same cache from PyTorch: needs the extra `torch`.

Nothing else in the library imports torch, and with launch plans at hand nothing here imports jax.
"""
