"""The decode kernel, interpreted on a CPU, against its definition in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import Schedule, decode_attention
from tests.pallas_kernels.blocks import definition, random_blocks

# Relative error of the output norm: measured 1e-4 to 4e-4 (15-bit queries and probabilities).
TOLERANCE = 1e-3


@pytest.mark.parametrize(
    ("bits", "tokens", "channels", "pages"),
    [((4, 4), 64, 128, 2), ((3, 2), 64, 64, 2), ((1, 4), 32, 128, 1), ((6, 5), 64, 64, 1)],
)
def test_equals_definition(bits, tokens, channels, pages):
    rng = np.random.default_rng(0)
    blocks, keys, values = random_blocks(rng, 16, 2, tokens, channels, bits)
    q = rng.standard_normal((3, 6, channels)).astype(np.float32)
    table = rng.permutation(16)[:15].reshape(3, 5).astype(np.int32)
    lengths = np.array([0, 3 * tokens + 5, 5 * tokens], np.int32)
    out, lse = decode_attention(
        jnp.asarray(q),
        (blocks,),
        jnp.asarray(table),
        jnp.asarray(lengths),
        sm_scale=channels**-0.5,
        schedule=Schedule(splits=2, pages=pages, warps=2, stages=3),
        interpret=True,
    )
    want, want_lse = definition(q, keys, values, table, lengths, channels**-0.5)
    assert np.linalg.norm(out - want) <= TOLERANCE * np.linalg.norm(want)
    assert np.all(np.asarray(out)[0] == 0) and np.all(np.isneginf(np.asarray(lse)[0]))
    np.testing.assert_allclose(lse[1:], want_lse[1:], atol=2e-3)
