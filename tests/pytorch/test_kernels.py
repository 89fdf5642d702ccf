"""A torch cache through the kernels, interpreted: the definition's outputs and pages."""

from dataclasses import replace

import numpy as np
import pytest

from tests.layout import calibration
from tests.pytorch.skip import torch
from turboquant_jax.cache.allocation import Allocation
from turboquant_jax.cache.config import CacheConfig, CodecConfig
from turboquant_jax.pytorch import choose, creation, updating
from turboquant_jax.pytorch.segments import Scores

pytest.importorskip("turboquant_jax.pytorch.operators", reason="needs the operators")
FREQUENCIES = tuple(10_000.0 ** -(np.arange(16) / 16))
PLAIN = CacheConfig(2, 2, 32, CodecConfig(4), CodecConfig(3), block=32, window=5, sinks=2)
CASES = {
    "before RoPE": replace(PLAIN, rope_frequencies=FREQUENCIES),
    "stored, float32": replace(PLAIN, dtype="float32", sliding_window=60),
    "trellis": replace(
        PLAIN, key=CodecConfig(2, code="trellis"), value=CodecConfig(2, code="trellis")
    ),
    "heads of several formats": replace(
        PLAIN,
        allocation=Allocation(((4, ((16, 4), (16, 2))), 8), ((2, 2), 5)),
        rope_frequencies=FREQUENCIES,
    ),
    "calibrated": replace(
        PLAIN,
        key=CodecConfig(((16, 4), (16, 2)), scales="joint_products"),
        value=CodecConfig(((8, 3), (24, 2)), scales="joint", rotation="block_hadamard"),
        rope_frequencies=FREQUENCIES,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_the_definition(name):
    """A prompt, then single tokens until a block is full: one cache by each, from the same bits."""
    config, scalar = CASES[name], name not in ("trellis", "heads of several formats", "calibrated")
    known = calibration(config)
    ours, other = (creation.create(config, 2, 120, seed=1, calibration=known) for _ in "ab")
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(getattr(torch, config.dtype)) + 1

    k, v, counts = random(2, 2, 66, 2, 32), random(2, 2, 66, 2, 32), torch.tensor([65, 66])
    by = choose.compression_of(other, "kernels" if scalar else None)
    for cache, compression in ((ours, choose.DEFINITION), (other, by)):
        updating.begin(cache, counts, 66)
        for layer in range(2):
            updating.write(cache, layer, k[layer], v[layer], compression)
        updating.commit(cache, by=compression)
    assert_alike(ours, other)
    for _ in range(6):
        for cache in (ours, other):
            updating.begin(cache, torch.ones(2), 1)
        for layer in range(2):
            heads = random(2, 1, 4, 32), random(2, 1, 2, 32), random(2, 1, 2, 32)
            found = [
                choose.attend_and_write(cache, layer, heads, Scores(), None, by)
                for cache, by in ((ours, "torch"), (other, "kernels"))
            ]
            torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)
        updating.commit(ours)
        choose.commit(other, None, "kernels" if scalar else None)
    assert int(config.num_blocks(ours.table.lengths).sum()) == 4
    assert_alike(ours, other)


def test_more_heads_than_registers_hold_with_a_mean():
    """17 query heads of a kv head: one call, as in JAX."""
    config = CASES["before RoPE"]
    state, generator = creation.create(config, 1, 80, seed=1), torch.Generator().manual_seed(2)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(torch.bfloat16) + 1

    updating.append(state, random(2, 1, 66, 2, 32), random(2, 1, 66, 2, 32))
    heads = random(1, 1, 34, 32), random(1, 1, 2, 32), random(1, 1, 2, 32)
    found = []
    for by in ("kernels", "torch"):
        updating.begin(state, torch.ones(1), 1)
        found.append(choose.attend_and_write(state, 0, heads, Scores(), None, by))
    torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)


def assert_alike(ours, other):
    """The same bits, but for codes and scales at a tie."""
    for name, leaf in ours.leaves.items():
        got = other.leaves[name]
        if name.startswith("parts"):
            apart = leaf != got
            assert apart.float().mean() < 1e-3, f"{name}: {int(apart.sum())} of {leaf.numel()}"
        elif name == "key_mean":
            torch.testing.assert_close(leaf, got, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(leaf, got), name


def test_refusals_say_why():
    small = creation.create(replace(PLAIN, block=8), 1, 60)
    heads = (torch.zeros(1, 1, 2, 32),) * 3
    for cache, asked, error, text in (
        (small, "kernels", NotImplementedError, "got blocks of 8 tokens, served are"),
        (small, "xla", ValueError, "implementation: got 'xla', expected 'torch', 'kernels'"),
    ):
        with pytest.raises(error, match=text):
            choose.attend_and_write(cache, 0, heads, Scores(), None, asked)
