"""Tests that need eight devices: `tests/test_sharded.py` says where they are."""

import jax

collect_ignore_glob = ["test_*.py"] if jax.device_count() < 8 else []
