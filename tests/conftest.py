"""Set for every test: strict promotion, checked shapes, quick compilation, which tests are slow."""

import gc
import os
from importlib.metadata import version
from pathlib import Path

import pytest

# what was compiled is kept for the other workers and the next run; apart from that of commands that
# tests start, whose writes are not atomic
PROGRAMS = Path(__file__).parents[1] / ".pytest_cache" / "programs"
COMMANDS = str(PROGRAMS / "commands")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", COMMANDS)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

# XLA's older emitter and one module a program compile in 0.4 of the time. They are options of this
# jaxlib: the next one has no older emitter, and a flag that it does not know ends the process.
if version("jaxlib").startswith("0.10."):
    QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}".strip()

import jax  # noqa: E402
from jax._src.lru_cache import LRUCache  # noqa: E402  (no public way to where programs are kept)

from tests import shapes  # noqa: E402


def put_whole(self, key: str, value: bytes) -> None:
    """A program appears at once, or another worker would read half of it."""
    path = self.path / f"{key}-cache"
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(value)
        part.replace(path)


LRUCache.put = put_whole
if os.environ["JAX_COMPILATION_CACHE_DIR"] == COMMANDS:
    jax.config.update("jax_compilation_cache_dir", str(PROGRAMS / "tests"))

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
if jax.default_backend() == "cpu":  # compiling costs more than what is compiled
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # of commands that tests start

gc.set_threshold(50_000, 20, 100)  # tracing makes many objects that stay: look at them less often

shapes.install()

# functions whose cases take 2.5 s or more together, as `pytest --durations=0` says
SLOW = frozenset(Path(__file__).with_name("slow.txt").read_text().split())

LONGEST = "test_sharded.py", "test_hosts.py"  # processes of several devices


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks slow tests, but never all of a file: its first one is met by `-m "not slow"` too."""
    slow = [item for item in items if item.nodeid.partition("[")[0] in SLOW]
    met = {item.path for item in set(items) - set(slow) if "gpu" not in item.keywords}
    for item in slow:
        if item.path in met:
            item.add_marker(pytest.mark.slow)
        met.add(item.path)
    # the longest first: at the end, one would be waited for
    items.sort(key=lambda item: item.path.name not in LONGEST)
