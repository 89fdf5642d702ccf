"""The rule of what is compressed when, and what a config refuses."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_jax.cache import Allocation, CacheConfig, CodecConfig
from turboquant_jax.cache.layout import block_slots
from turboquant_jax.pytorch.constants import codecs_of

sizes = st.fixed_dictionaries(
    {
        "block": st.integers(1, 4).map(lambda n: 8 * n),
        "window": st.integers(0, 70),
        "sinks": st.integers(0, 9),
    }
)


@settings(deadline=None, derandomize=True)
@given(sizes=sizes, length=st.integers(0, 500))
def test_the_rule(sizes, length):
    config = CacheConfig(1, 1, 8, **sizes)
    compressed = config.compressed_tokens(length)
    rest = length - config.sinks - compressed
    assert compressed % config.block == 0 and compressed == config.block * config.num_blocks(length)
    if compressed:
        assert config.window <= rest < config.window + config.block
    else:
        assert rest < config.window + config.block
    assert config.compressed_tokens(jnp.asarray([length])).tolist() == [compressed]


@settings(deadline=None, derandomize=True)
@given(sizes=sizes, local=st.integers(1, 200), length=st.integers(0, 500))
def test_a_ring_has_the_blocks_that_the_next_query_sees_and_none_to_spare(sizes, local, length):
    config = CacheConfig(1, 1, 8, sliding_window=local, **sizes)
    edge = config.sinks + config.compressed_tokens(length)
    seen = [p for p in range(config.sinks, edge) if length - p < local]
    blocks = {(p - config.sinks) // config.block for p in seen}
    slots = block_slots(config, 10**6)
    assert len(blocks) <= slots
    if length > local + config.sinks + config.window + config.block:
        lengths = range(length, length + config.block)
        assert slots == max(len(_seen_blocks(config, n)) for n in lengths)


def _seen_blocks(config, length):
    edge = config.sinks + config.compressed_tokens(length)
    first = max(config.sinks, length - config.sliding_window + 1)
    return {(p - config.sinks) // config.block for p in range(first, edge)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(block=12), "block: got 12, expected a multiple of 8 tokens"),
        (dict(block=0), "block: got 0, expected at least 1"),
        (dict(window=-1), "window: got -1, expected at least 0"),
        (dict(sinks=-1), "sinks: got -1, expected at least 0"),
        (dict(sliding_window=0), "sliding_window: got 0, expected at least 1"),
        (dict(dtype="int8"), "dtype: got int8, expected a floating type"),
        (dict(dtype="bf15"), "dtype: got 'bf15', expected a floating type"),
        (dict(key=CodecConfig(9)), "key.bits: got 9, expected between 1 and 8"),
        (dict(value=CodecConfig(((4, 2), (3, 1)))), "add up to head_dim 8"),
        (dict(value=CodecConfig(2.5)), "got .*2.5.*, expected an integer or"),
        (dict(value=CodecConfig([(8, 2)])), "an integer or"),
        (
            dict(value=CodecConfig(code="prod")),
            "value.code: got 'prod', .* a sketch is for products",
        ),
        (
            dict(key=CodecConfig(code="qjl")),
            "key.code: got 'qjl', expected one of scalar, trellis, p",
        ),
        (
            dict(key=CodecConfig(1, code="prod")),
            "key.bits: got 1, expected at least 2, one of them",
        ),
        (
            dict(key=CodecConfig(code="prod"), allocation=Allocation((1,), (1,))),
            "key.bits: got 1, expected at least 2",
        ),
        (
            dict(key=CodecConfig(code="prod", scales="joint")),
            "key.scales: got joint, expected group",
        ),
        (
            dict(key=CodecConfig(16), value=CodecConfig(16)),
            "key.bits and value.bits: got 16 and 16, expected one of them coded",
        ),
        (dict(key=CodecConfig(16), dtype="float32"), "dtype beside key.bits of 16: got float32"),
        (dict(key=CodecConfig(16, code="prod")), "key.code beside key.bits of 16: got prod"),
        (dict(value=CodecConfig(16, scales="joint")), "scales beside value.bits of 16: got joint"),
        (
            dict(value=CodecConfig(16), allocation=Allocation((1,), (1,))),
            "allocation beside value.bits of 16",
        ),
        (dict(scale_bits=4), "scale_bits: got 4, expected 8 or 16"),
        (
            dict(scale_bits=8, key=CodecConfig(4, code="prod")),
            "scale_bits: got 8, expected 16, where the code is prod",
        ),
        (dict(num_layers=0), "num_layers: got 0, expected at least 1"),
    ],
)
def test_what_is_refused(change, says):
    with pytest.raises(ValueError, match=says):
        CacheConfig(**dict(num_layers=1, num_kv_heads=1, head_dim=8) | change)


def test_torch_says_that_it_has_no_scales_of_8_bits():
    with pytest.raises(ValueError, match="scale_bits: got 8, expected 16"):
        codecs_of(CacheConfig(1, 1, 8, scale_bits=8), 0)


def test_torch_says_that_it_has_no_side_in_full_precision():
    with pytest.raises(ValueError, match="bits: got 16, expected between 1 and 8"):
        codecs_of(CacheConfig(1, 1, 8, CodecConfig(16)), 0)


def test_torch_says_that_it_has_no_sketches():
    with pytest.raises(ValueError, match="expected one of scalar, trellis: in torch no sketches"):
        codecs_of(CacheConfig(1, 1, 8, CodecConfig(code="prod")), 0)


def test_it_compares_and_hashes_by_value():
    one, other = (CacheConfig(1, 1, 8, dtype=d) for d in (jnp.bfloat16, "bfloat16"))
    assert one == other and hash(one) == hash(other) and one.dtype == "bfloat16"
    assert CacheConfig(1, 1, 8, dtype=np.float32) != one


def test_a_head_of_more_bits_than_a_trellis_has_is_scalar():
    codec = CodecConfig(code="trellis", scales="joint")
    assert codec.of(4) == CodecConfig(4, code="trellis")
    assert codec.of(5) == CodecConfig(5)
    assert codec.of(((4, 6), (12, 1))) == CodecConfig(
        ((4, 6), (12, 1)), code="trellis", scales="joint"
    )
    assert CodecConfig(code="prod").of(6) == CodecConfig(6, code="prod")
