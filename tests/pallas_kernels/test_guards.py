"""Machine code for an H100, made without one: registers, spills, and copies of what is stored.

`make guards` installs what this needs, 0.26 GB, beside the virtual environment and runs it.
"""

import json
from functools import partial

import jax
import pytest

from tests.pallas_kernels import cases, guards
from turboquant_jax import cache

RECORDED = json.loads(guards.FILE.read_text())
pytestmark = [
    pytest.mark.skipif(not guards.INSTALLED, reason="needs jax's CUDA plug-in: make guards"),
    pytest.mark.skipif(
        jax.__version__ != RECORDED["jax"], reason=f"recorded with jax {RECORDED['jax']}"
    ),
]


@pytest.mark.parametrize("name", RECORDED["ptxas"])
def test_registers_and_spills(name):
    """No more registers, and no spills but those recorded."""
    case = cases.MAKERS[name]()
    found = guards.resources(case.function, *case.arguments)
    recorded = RECORDED["ptxas"][name]
    assert set(found) == set(recorded)
    for kernel, (registers, spilled) in found.items():
        assert registers <= recorded[kernel][0] and spilled <= recorded[kernel][1], kernel


def _copies(function, *arguments, donate=True) -> list[str]:
    lowered = guards.lower_for_h100(function, *arguments, donate=(0,) if donate else ())
    return guards.copies(guards.compile_for_h100(lowered), guards.smallest_stored(arguments[0]))


def _commit_of_trellis() -> cases.Case:
    """Compressed by XLA, in a loop that must leave the pool where it is."""
    config = cache.preset("balanced", 2, 2, 64)
    state = jax.eval_shape(lambda: cache.create(config, 3, 1024, key=jax.random.key(0)))
    return cases.Case(partial(cache.commit, implementation="xla"), (state,))


@pytest.mark.parametrize("part", ["step", "commit", "commit of a trellis"])
def test_nothing_stored_is_copied(part):
    """With a donated cache; a cache that is kept is copied, which shows that copies are seen."""
    if part == "commit of a trellis":
        case = _commit_of_trellis()
    else:
        case = cases.of_cache(4, 128, "hadamard", "bfloat16")[part]
    assert not _copies(case.function, *case.arguments)
    assert _copies(case.function, *case.arguments, donate=False)
