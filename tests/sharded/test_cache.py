"""A cache on a mesh holds the bits of one on one device, and attention over it is the same."""

import itertools
from dataclasses import replace
from functools import cache as once
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.sharded import read
from tests.sharded.read import Sizes
from turboquant_jax import attention, cache
from turboquant_jax.attention import sharding as attention_sharding
from turboquant_jax.cache import Allocation, CacheConfig, CodecConfig, layout, sharding
from turboquant_jax.cache.calibration import Calibration, from_moments
from turboquant_jax.cache.mesh import make_mesh

LAYERS, HEADS, DIM = 2, 8, 16
# the second one lacks a token to its first block; of eight, the first one has nine stripes
TWO, EIGHT = (151, 27), (291, 27, 0, 91, 151, 64, 200, 140)
FREQUENCIES = tuple(1e4 ** (-np.arange(DIM // 2) / (DIM // 2)))
PLAIN = CacheConfig(
    LAYERS, HEADS, DIM, block=16, window=8, dtype="float32", rope_frequencies=FREQUENCIES
)
GROUPS = CodecConfig(((8, 4), (8, 2)))
JOINT = CodecConfig(scales="joint_products")
WIDE, NARROW = ((8, 4), (8, 2)), ((8, 3), (8, 1))
MIXED = ((WIDE, NARROW, NARROW, WIDE) * 2, (NARROW,) * HEADS)
FORMATS = {
    "scalar": {},
    "two bits, the mean as stored": dict(
        key=CodecConfig(2), value=CodecConfig(2), rope_frequencies=None
    ),
    "eight bits and full precision": dict(
        key=CodecConfig(8),
        value=CodecConfig(16),
        center_keys=False,
        dtype="bfloat16",
        rope_frequencies=None,
    ),
    "trellis": dict(key=CodecConfig(3, code="trellis"), value=CodecConfig(2, code="trellis")),
    "sketch": dict(key=CodecConfig(3, code="prod"), value=CodecConfig(3)),
    "groups": dict(key=GROUPS, value=GROUPS, scale_bits=8),
    "calibrated": dict(key=JOINT, value=JOINT, allocation=Allocation(MIXED, MIXED)),
}
MESHES = [
    Sizes(data, tensor, context)
    for data, tensor, context in itertools.product((1, 2, 4, 8), repeat=3)
    if data * tensor * context <= 8
]
ATTENDED = [Sizes(1, 1, 1), Sizes(1, 1, 2), Sizes(1, 4, 1), Sizes(2, 2, 2)]


@pytest.fixture(autouse=True)
def short_stripes(monkeypatch):
    monkeypatch.setattr(layout, "STRIPE", read.STRIPE)


def tokens(batch, count, seed=1):
    shape = 2, LAYERS, batch, count, HEADS, DIM
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def chunk_of(counts):
    return tokens(len(counts), max(counts)), jnp.asarray(counts, jnp.int32)


@pytest.fixture(scope="module")
def chunk():
    return chunk_of(TWO)


@pytest.fixture(scope="module")
def chunk_of_eight():
    return chunk_of(EIGHT)


def made(config, batch, capacity, **options):
    """On one device."""
    make = jax.jit(partial(cache.create, config, batch, capacity, **options))
    return make(key=jax.random.key(0))


def options_of(config):
    if config.key.scales != "group":
        x = np.random.default_rng(0).normal(size=(4, LAYERS, HEADS, DIM, DIM))
        moments = x @ np.swapaxes(x, -1, -2)
        return dict(calibration=Calibration(*(from_moments(*moments[i : i + 2]) for i in (0, 2))))
    if isinstance(config.key.bits, tuple):
        channels = np.tile(np.arange(DIM), (LAYERS, HEADS, 1))
        order = np.random.default_rng(0).permuted(channels, axis=-1)
        return dict(key_order=jnp.asarray(order, jnp.int32))
    return {}


def filled(config, chunk, sizes=None, more=0):
    """After a chunk and `more` tokens: one completes the first block of the second sequence."""
    (_, counts), batch, capacity = chunk, chunk[1].size, int(chunk[1].max()) + 9
    keys, values, *new = (
        x.astype(config.dtype) for pair in (chunk[0], tokens(batch, 1, seed=2)) for x in pair
    )
    if sizes is None:
        held, append = made(config, batch, capacity, **options_of(config)), jax.jit(cache.append)
    else:
        mesh = make_mesh(*sizes)
        held = sharding.create(
            mesh, config, batch, capacity, key=jax.random.key(0), **options_of(config)
        )
        append = jax.jit(partial(sharding.append, mesh))
    held = append(held, keys, values, counts)
    for _ in range(more):
        held = append(held, *new)
    return held


def attended(config, held, sizes=None):
    """Of one query of each sequence and head, in the first layer."""
    batch = held.lengths.size
    q = jax.random.normal(jax.random.key(3), (batch, 1, 2 * HEADS, DIM), jnp.float32)
    (k, v), sinks = tokens(batch, 1, seed=4)[:, 0], jnp.linspace(-1.0, 1.0, 2 * HEADS)
    call = attention.attend
    if sizes is not None:
        call = partial(attention_sharding.attend, make_mesh(*sizes))
    return jax.jit(call, static_argnums=1)(held, 0, q, k, v, sink_logits=sinks)


def named(name):
    return replace(PLAIN, **FORMATS[name])


@pytest.fixture(scope="module")
def one_device(chunk_of_eight):
    return once(lambda name: read.stored(filled(named(name), chunk_of_eight), Sizes()))


@pytest.fixture(scope="module")
def plain(chunk):
    held = filled(PLAIN, chunk, more=2)
    return read.stored(held, Sizes()), attended(PLAIN, held)


@pytest.mark.parametrize("sizes", ATTENDED, ids=str)
def test_what_follows_and_attention_are_those_of_one_device(chunk, plain, sizes):
    held = filled(PLAIN, chunk, sizes, more=2)
    read.assert_equal(read.stored(held, sizes), plain[0])
    # sums of shares are in another order: a few roundings of numbers below 1
    np.testing.assert_allclose(attended(PLAIN, held, sizes), plain[1], atol=2e-6)


@pytest.mark.parametrize("name", ["trellis", "groups", "calibrated"])
def test_attention_in_a_format_is_that_of_one_device(chunk, name):
    config, sizes = named(name), Sizes(1, 2, 2)
    one, many = (filled(config, chunk, on) for on in (None, sizes))
    read.assert_equal(read.stored(many, sizes), read.stored(one, Sizes()))
    expected = attended(config, one)
    np.testing.assert_allclose(attended(config, many, sizes), expected, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_on_every_mesh_has_the_bits_of_one_device(
    chunk_of_eight, one_device, name, sizes
):
    config = named(name)
    if name == "calibrated" and sizes.tensor == HEADS:  # a head a device, of unlike formats
        with pytest.raises(ValueError, match="heads of each format on 8 shards"):
            filled(config, chunk_of_eight, sizes)
        return
    # XLA on a CPU adds up the products of a rotation in an order that depends on how many vectors
    # there are: of 256 levels a vector in 10,000 has a channel on the edge between two
    edges = 2e-4 if config.key.bits == 8 else 0.0
    read.assert_equal(
        read.stored(filled(config, chunk_of_eight, sizes), sizes), one_device(name), edges
    )
