"""Tests that need eight devices: `tests/test_sharded.py` says where they are."""

import jax

from tests.models.conftest import gguf_tensors, write_gguf

__all__ = ["gguf_tensors", "write_gguf"]  # fixtures

collect_ignore_glob = ["test_*.py"] if jax.device_count() < 8 else []
