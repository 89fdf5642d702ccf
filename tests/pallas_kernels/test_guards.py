"""Machine code for an H100, made without one: registers, spills, and copies of what is stored.

`make guards` installs what this needs, 0.26 GB, beside the virtual environment and runs it. Equal
IR compiles to what was recorded by the same compilers, so that only the kernels whose IR is another
are compiled, and `ALWAYS`; `make guards-all` compiles all.
"""

import json
import os
from functools import partial

import jax
import pytest

from tests.pallas_kernels import cases, guards
from turboquant_jax import cache

RECORDED = json.loads(guards.FILE.read_text())
pytestmark = pytest.mark.skipif(
    not guards.INSTALLED, reason="needs jax's CUDA plug-in: make guards"
)
recorded_jax = pytest.mark.skipif(
    jax.__version__ != RECORDED["jax"], reason=f"recorded with jax {RECORDED['jax']}"
)


# Every kernel once: that these compilers make what was recorded is seen, not only concluded.
ALWAYS = {
    "attend 2x2 1x8192",
    "search 2 64",
    "cache 4 128 hadamard bfloat16 chunk",
    "cache 4 128 hadamard bfloat16 projected step",
    "formats step",
}
if os.environ.get("GUARDS_OF") == "all":
    ALWAYS |= set(RECORDED["ptxas"])


def is_known(name, lowered) -> bool:
    """Whether these compilers have been given this IR before."""
    same = all(RECORDED[key] == version for key, version in guards.toolchain().items())
    return same and guards.digests(lowered.as_text()) == RECORDED["ir"][name]


def test_every_kernel_is_compiled():
    every = {kernel for found in RECORDED["ptxas"].values() for kernel in found}
    assert every == {kernel for name in ALWAYS for kernel in RECORDED["ptxas"][name]}


@pytest.mark.parametrize("name", cases.MAKERS)
def test_registers_and_spills(name):
    """No more registers, and no spills but those recorded; then the IR, as in `test_lowering`,
    which `.ci/run` leaves out for it: each case is lowered once.
    """
    case = cases.MAKERS[name]()
    lowered = guards.lower_for_h100(case.function, *case.arguments)
    if jax.__version__ == RECORDED["jax"] and (name in ALWAYS or not is_known(name, lowered)):
        assert_resources(name, lowered)
    guards.assert_lowered(name, case, lowered.as_text())


def assert_resources(name, lowered):
    found = guards.resources(lowered)
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


@recorded_jax
@pytest.mark.parametrize("part", ["step", "commit", "commit of a trellis"])
def test_nothing_stored_is_copied(part):
    """With a donated cache; a cache that is kept is copied, which shows that copies are seen."""
    if part == "commit of a trellis":
        case = _commit_of_trellis()
    else:
        case = cases.of_cache(4, 128, "hadamard", "bfloat16")[part]
    assert not _copies(case.function, *case.arguments)
    assert _copies(case.function, *case.arguments, donate=False)
