"""torch and transformers are an extra: without them these tests say so and do nothing."""

import pytest

torch = pytest.importorskip("torch", reason="needs torch: make test-torch")
