"""The cache in torch holds the bits of the JAX cache, whatever happens to both."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.layout import CODEC, QUICK, SMALL, calibration
from tests.pytorch.equal import assert_equal, robust_tokens
from tests.pytorch.skip import torch
from turboquant_jax import cache
from turboquant_jax.cache import layout as jax_layout
from turboquant_jax.cache import pages as jax_pages
from turboquant_jax.pytorch import constants, creation, pages, sharing, trellis, updating
from turboquant_jax.pytorch.layout import Layout
from turboquant_jax.quantizers import trellis as jax_trellis

CAPACITY, BATCH, SEED = 70, 3, 2
CHUNKS = 1, 11
FREQUENCIES = tuple(10_000.0 ** -(np.arange(8) / 8))
PLAIN = cache.CacheConfig(head_dim=16, **SMALL)
CONFIGS = {
    "scalar": replace(PLAIN, key=CODEC(4), value=CODEC(3), rope_frequencies=FREQUENCIES),
    "trellis bfloat16": replace(
        PLAIN,
        key=CODEC(2, code="trellis"),
        value=CODEC(1, code="trellis", scale="matched"),
        rope_frequencies=FREQUENCIES[:4],
        dtype="bfloat16",
    ),
    "groups, pool": replace(
        PLAIN,
        key=CODEC(((8, 4), (8, 2)), scale="unbiased"),
        value=CODEC(((8, 3), (8, 2)), rotation="identity", scale="norm"),
    ),
    "calibrated": replace(
        PLAIN,
        key=CODEC(((8, 4), (8, 2)), scales="joint_products"),
        value=CODEC(((4, 3), (12, 2)), scales="joint", rotation="haar"),
        rope_frequencies=FREQUENCIES,
    ),
    "heads, sliding": replace(
        PLAIN,
        allocation=cache.Allocation(((4, 2), 8), ((2, 2), 5)),
        sliding_window=23,
        center_keys=False,
    ),
}


def options_of(name):
    rng = np.random.default_rng(5)
    if name == "calibrated":
        return (dict(calibration=calibration(CONFIGS[name])),) * 2
    if "groups" not in name:
        return {}, {}
    order = rng.permuted(np.broadcast_to(np.arange(16, dtype=np.int32), (2, 2, 16)), axis=-1)
    pool = dict(num_pages=14)
    return pool | dict(key_order=jnp.asarray(order)), pool | dict(orders=(order, None))


def append_in_torch(ours, new, counts, rng):
    """As on a GPU, where nobody looks who completed a block, or as on a CPU."""
    k, v = map(torch.from_numpy, new)
    updating.begin(ours, torch.from_numpy(counts), k.shape[2])
    for layer in range(ours.config.num_layers):
        updating.write(ours, layer, k[layer], v[layer])
    updating.commit(ours, torch.arange(BATCH) if rng.random() < 0.5 else None)


@pytest.mark.parametrize("name", CONFIGS)
def test_random_operations(name):
    """Chunks and single tokens of any counts, forks, frees, overflows: all tensors stay equal."""
    config, rng = CONFIGS[name], np.random.default_rng(11)
    theirs_options, options = options_of(name)
    known = {key: value for key, value in options.items() if key != "num_pages"}
    k, v = robust_tokens(config, CAPACITY, BATCH, rng, seed=SEED, **known)
    theirs = cache.create(config, BATCH, CAPACITY, key=jax.random.key(SEED), **theirs_options)
    ours = creation.create(config, BATCH, CAPACITY, seed=SEED, **options)
    assert_equal(theirs, ours)
    append = jax.jit(partial(cache.append, implementation="xla"), compiler_options=QUICK)
    fork, free = (jax.jit(f, compiler_options=QUICK) for f in (cache.fork, cache.free))
    owner, blocks, overflows = list(range(BATCH)), 0, 0
    for _ in range(60):
        lengths = np.asarray(theirs.lengths)
        what = rng.choice(["chunk", "fork", "free"], p=[0.86, 0.08, 0.06])
        if what == "fork":
            source, target = map(int, rng.permutation(BATCH)[:2])
            theirs = fork(theirs, source, target)
            sharing.fork(ours, source, target)
            owner[target] = owner[source]
        elif what == "free":
            rows = rng.random(BATCH) < 0.5
            theirs = free(theirs, jnp.asarray(rows))
            sharing.free(ours, torch.from_numpy(rows))
            owner = [row if rows[row] else owner[row] for row in range(BATCH)]
        else:
            most = int(rng.choice(CHUNKS))
            counts = rng.integers(-1 if rng.random() < 0.1 else 0, most + 1, BATCH, dtype=np.int32)
            place = np.minimum(lengths[:, None] + np.arange(most), CAPACITY - 1)
            new = [x[:, np.array(owner)[:, None], place] for x in (k, v)]
            theirs = append(theirs, *map(jnp.asarray, new), jnp.asarray(counts))
            append_in_torch(ours, new, counts, rng)
        assert_equal(theirs, ours)
        overflows += int(theirs.overflow.sum())
        blocks += int(config.num_blocks(np.asarray(theirs.lengths)).sum())
    assert blocks > 100 and overflows > 0


def test_codes_of_many_vectors():
    """Of 8,192 vectors that nobody chose, codes differ where a tie is a rounding away."""
    config = cache.CacheConfig(1, 1, 64, CODEC(4), CODEC(4, code="trellis"))
    theirs = cache.create(config, 1, 200, key=jax.random.key(SEED)).parts[0].codecs
    ours = creation.create(config, 1, 200, seed=SEED).parts[0].codecs
    x = np.random.default_rng(3).normal(0, 1, (8192, 1, 64)).astype(np.float32)
    for codec, own in zip(theirs, ours, strict=True):
        quantize = jax.jit(lambda x, codec=codec: codec.quantize(jnp.arange(1), x, "xla"))
        ((indices, scale),) = quantize(x)
        ((found, own_scale),) = own.quantize(slice(0, 1), torch.from_numpy(x))
        assert (np.asarray(indices) != found.numpy()).any(axis=-1).sum() <= 4
        differs = np.asarray(scale).view(np.uint16) != own_scale.view(torch.uint16).numpy()
        assert differs.sum() <= 4


def test_pages_of_random_tables():
    """Shared, left and free pages in any mixture, short of free ones or not: `cache.pages`."""
    rng, assign, short = np.random.default_rng(6), jax.jit(jax_pages.assign), 0
    for _ in range(200):
        table = rng.integers(-1, 4, (3, 2), dtype=np.int32)
        filled = rng.random((3, 2)) < 0.6
        references = np.bincount(table[table >= 0], minlength=4).astype(np.int32)
        expected = assign(references, table, filled)
        own = torch.from_numpy(references.copy())
        page, granted = pages.assign(own, torch.from_numpy(table), torch.from_numpy(filled))
        for theirs, ours in zip(expected, (page, granted, own), strict=True):
            np.testing.assert_array_equal(theirs, ours.numpy())
        short += int(not granted.all())
    assert 0 < short < 200


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_paths_of_equal_cost(bits):
    """Of ties, which small integers and zeros are full of, both take the same path."""
    table = np.arange(-(2**bits), 2**bits) + 0.5
    y = np.random.default_rng(bits).integers(-2, 3, (64, 24)) * (np.arange(64) > 0)[:, None]
    y, table = y.astype(np.float32), table.astype(np.float32)
    expected = jax_trellis.encode_with(jnp.asarray(y), jnp.asarray(table))
    got = trellis.encode(torch.from_numpy(y), torch.from_numpy(table))
    np.testing.assert_array_equal(expected, got.numpy())


@pytest.mark.parametrize("window", [None, 23])
def test_rule_of_place(window):
    """`layout` in torch is `cache.layout`, for every length."""
    config = replace(PLAIN, sliding_window=window)
    sizes = config, 2, 13, jax_layout.block_slots(config, CAPACITY)
    theirs, ours = jax_layout.Layout(*sizes), Layout(*sizes)
    length = np.arange(CAPACITY, dtype=np.int32)[:, None]
    pending = np.arange(CAPACITY, dtype=np.int32)[:, None] % 20
    tensors = torch.from_numpy(length), torch.from_numpy(pending)
    pairs = [
        (theirs.exact_positions(length), ours.exact_positions(tensors[0])),
        (theirs.block_positions(length), ours.block_positions(tensors[0])),
        (
            theirs.written(length, pending, np.arange(20, dtype=np.int32)[None]),
            ours.written(*tensors, 20),
        ),
        (
            theirs.completed(length[:, 0], pending[:, 0], 20),
            ours.completed(tensors[0][:, 0], tensors[1][:, 0], 20),
        ),
    ]
    for expected, got in pairs:
        for a, b in zip(expected, got, strict=True):
            np.testing.assert_array_equal(np.asarray(a), b.numpy())


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_random_bits(seed):
    """Keys and signs are those of `jax.random`."""
    key = jax.random.key(seed)
    raw = np.asarray(jax.random.key_data(key))
    expected = jax.random.key_data(jax.random.split(key, 5))
    np.testing.assert_array_equal(expected, constants.split(raw, 5))
    signs = jax.random.rademacher(key, (64,), jnp.float32)
    np.testing.assert_array_equal(signs, constants.rademacher(raw, 64))
