"""Splits of the sequences of a batch: about as many tokens in each."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention.shares import Shares
from pallas_kernels.primitives import triton
from tests.marks import GPU


def counts(shares, lengths, interpret):
    """Of every sequence."""
    whole = triton.BlockSpec(lengths.shape, lambda i: (0,))

    def kernel(lengths, out):
        sequence = triton.program_id(0)
        triton.store(out.at[sequence], shares.count(lengths, sequence))

    with triton.interpreted(interpret):
        return triton.call(
            kernel,
            triton.Launch((shares.batch,), warps=1, stages=1),
            in_specs=(whole,),
            out_specs=whole,
            out_shape=jax.ShapeDtypeStruct(lengths.shape, jnp.int32),
            name="counts",
        )(jnp.asarray(lengths))


@pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=GPU)])
@pytest.mark.parametrize("seed", range(3))
def test_no_split_has_more_than_its_share_of_the_tiles(seed, interpret):
    """Unless its sequence has as many splits as it may; and few programs come on top."""
    rng = np.random.default_rng(seed)
    shares = Shares(batch=11, splits=6, most=20, tile=64, limit=32_768, more=4)
    lengths = rng.integers(0, 40_000, shares.batch).astype(np.int32)
    lengths[:2] = 0, 40_000  # a ring of pages has no more than the limit
    found = np.asarray(counts(shares, lengths, interpret))
    tiles = [min(int(n), shares.limit) // shares.tile + shares.more for n in lengths]
    share = Fraction(sum(tiles), shares.batch * shares.splits)
    for count, own in zip(found.tolist(), tiles, strict=True):
        assert 1 <= count <= shares.most
        assert count == shares.most or Fraction(own, count) <= share
        assert count == 1 or Fraction(own, count - 1) > share
    assert found.sum() <= shares.batch * (shares.splits + 1)


def test_equal_lengths_have_equal_splits():
    shares = Shares(batch=7, splits=5, most=20, tile=64, limit=10**7, more=1)
    for length in (0, 64, 5000, 4_000_000):  # no product is beyond 31 bits
        np.testing.assert_array_equal(counts(shares, np.full(7, length, np.int32), True), 5)
