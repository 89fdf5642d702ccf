"""torch beside JAX on a few cores: one thread is quicker than two that wait for each other."""

try:
    import torch
except ImportError:  # the tests skip themselves
    pass
else:
    torch.set_num_threads(1)
