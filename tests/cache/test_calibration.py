"""Calibrated caches: bases from moments, one scale for groups of several bits, bytes and files."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import crossed
from tests.layout import CAPACITY, QUICK, calibration, empty_cache, random_tokens, row_of_head
from tests.quantizers.test_channels import moments
from turboquant_jax import cache
from turboquant_jax.cache import codec
from turboquant_jax.cache.bytes import compression_ratio, count_bytes, planned_bytes
from turboquant_jax.cache.calibration import Calibration, from_moments, identity
from turboquant_jax.cache.calibration import moments as moments_of
from turboquant_jax.cache.choose import choose_attention, choose_compression
from turboquant_jax.cache.storage import restore, save

CODEC = cache.CodecConfig
CONFIG = cache.CacheConfig(
    2, 2, 32, CODEC(((8, 4), (8, 2), (16, 1)), code="trellis", scales="joint"),
    CODEC(((16, 3), (16, 2)), scales="joint_products"), block=32, window=20, sinks=3,
)  # fmt: skip


SPLIT = CONFIG.key.bits
BY_FORMAT = cache.Allocation(keys=((SPLIT, 2), SPLIT), values=(3, (2, 3)))
KINDS = ((SPLIT, 3), (2, 3), (SPLIT, 2))


def shapes(config, known, **options):
    """Of a cache of one sequence."""
    make = partial(cache.create, config, 1, CAPACITY, key=jax.random.key(0), **options)
    return jax.eval_shape(lambda: make(calibration=known))


def test_moments_are_those_of_the_vectors_of_each_head():
    """S_q of the queries of the group, 3 of a head."""
    rng = np.random.default_rng(0)
    q, x = (rng.normal(0, 1, (50, n, 8)).astype(np.float32) for n in (6, 2))
    of_x, of_q = jax.jit(moments_of)(q, x)
    for head in range(2):
        vectors = x[:, head].astype(float)
        np.testing.assert_allclose(of_x[head], vectors.T @ vectors / 50, rtol=1e-4, atol=1e-5)
        queries = q[:, 3 * head : 3 * head + 3].reshape(-1, 8).astype(float)
        np.testing.assert_allclose(of_q[head], queries.T @ queries / 150, rtol=1e-4, atol=1e-5)


def test_in_the_basis_vectors_and_queries_have_the_same_diagonal_moments():
    """sqrt(L), descending; L are the eigenvalues of S_x S_q, which is not symmetric.

    In a unit of each head, a power of two, in which float16 holds the matrix.
    """
    rng = np.random.default_rng(1)
    of_x, of_q = (moments((3, 2, 16), rng, 5) for _ in range(2))
    basis = from_moments(100 * of_x, of_q)
    matrix, inverse = (np.asarray(m, np.float64) for m in (basis.matrix, basis.inverse))
    assert np.all(matrix.astype(np.float16) == matrix)
    largest = np.abs(matrix).max(axis=(-2, -1))
    assert np.all((largest > 0.5) & (largest <= 1))
    values = np.sort(np.linalg.eigvals(100 * of_x @ of_q).real, axis=-1)[..., ::-1]
    unit = np.asarray(basis.variance[..., :1]) / np.sqrt(values[..., :1])
    assert np.all(np.abs(np.log2(unit) - np.rint(np.log2(unit))) < 1e-4)
    np.testing.assert_allclose(basis.variance, unit * np.sqrt(values), rtol=1e-4)
    expected = np.sqrt(values)[..., None] * np.eye(16)
    of_x = np.swapaxes(matrix, -1, -2) @ (100 * of_x) @ matrix / unit[..., None]
    of_q = inverse @ of_q @ np.swapaxes(inverse, -1, -2) * unit[..., None]
    for found in (of_x, of_q):
        np.testing.assert_allclose(found, expected, atol=2**-9 * values.max() ** 0.5)


def test_directions_that_no_text_met_stay_invertible():
    """Moments of rank 3, and of a head that is zero: B^-1 is the inverse of B, in float32."""
    rng = np.random.default_rng(2)
    few = rng.normal(size=(2, 16, 3))
    low = few @ np.swapaxes(few, -1, -2)
    low[1] = 0
    for of_x, of_q in (
        (low, moments((2, 16), rng, 5)),
        (moments((2, 16), rng, 5), low),
        (low, low),
    ):
        basis = from_moments(of_x, of_q)
        matrix, inverse = (np.asarray(m, np.float64) for m in (basis.matrix, basis.inverse))
        scale = np.linalg.norm(matrix, axis=(1, 2)) * np.linalg.norm(inverse, axis=(1, 2))
        off = np.abs(inverse @ matrix - np.eye(16)).max(axis=(1, 2))
        assert np.all(off < 2**-23 * scale)
        assert np.all(np.asarray(basis.variance) > 0)


def test_without_knowledge_and_groups_it_is_the_plain_codec():
    """Identity basis, one group: the same rotation, so the same codes and scales up to rounding."""
    config = CODEC(3)
    key, rows = jax.random.key(3), jnp.arange(2)
    basis = jax.tree.map(lambda x: x[0], identity(1, 2, 64).keys)
    joint = codec.create(key, replace(config, scales="joint"), 64, None, basis)
    plain = codec.create(key, config, 64)
    x = np.random.default_rng(3).normal(size=(500, 2, 64)).astype(np.float32)
    ((indices, scale),), ((expected, want),) = (
        jax.jit(lambda made, x: made.quantize(rows, x))(made, x) for made in (joint, plain)
    )
    assert np.mean(np.asarray(indices) == np.asarray(expected)) > 0.9999
    np.testing.assert_allclose(scale.astype(np.float32), want.astype(np.float32), rtol=2**-7)
    np.testing.assert_allclose(joint.matrix(rows), plain.matrix(rows).repeat(2, 0), atol=1e-6)


def test_chunks_give_the_bits_of_single_tokens(row_of, same_bits):
    """Keys and values of different groups, in a basis of each head; a fork shares its blocks."""
    empty = empty_cache(replace(CONFIG, dtype="bfloat16"), crossed.BATCH)
    steps = [[30, 17, 1], [33, 9, 60]]
    chunked, singly = crossed.append_both_ways(empty, steps)
    for row in range(crossed.BATCH):
        same_bits(row_of(chunked, row), row_of(singly, row))
    same_bits(chunked, singly)
    forked = jax.jit(cache.fork, static_argnums=(1, 2))(chunked, 0, 1)
    same_bits(row_of(forked, 1), row_of(chunked, 0))


def test_heads_of_an_allocation_are_those_of_their_formats(same_bits):
    """Block by block those of a cache that has the format everywhere; integers need no basis."""
    plain = replace(CONFIG, key=replace(CONFIG.key, code="scalar"))  # four quick programs
    config = replace(plain, allocation=BY_FORMAT)
    _, k, v = random_tokens(config, 60, 2)

    def filled(config):
        append = jax.jit(cache.append, compiler_options=QUICK)
        return append(empty_cache(config, 2), k, v, jnp.full(2, 60))

    assert BY_FORMAT.kinds == KINDS
    state = filled(config)
    others = {}
    for key, value in KINDS:
        codecs = dict(key=plain.key.of(key), value=plain.value.of(value))
        others[key, value] = filled(replace(plain, **codecs))
    for layer, head, kind in ((0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 0)):
        held = []
        for one in (state, others[KINDS[kind]]):
            part, row = row_of_head(one, layer, head)
            rows = jnp.asarray([row])
            turned = [codec.matrix(rows)[0] for codec in part.codecs]
            held.append((turned, jax.tree.map(lambda x, row=row: x[row], part.pool)))
        same_bits(*held)


def test_of_an_allocation_only_heads_with_groups_have_matrices():
    config = replace(CONFIG, allocation=BY_FORMAT)
    planned, state = planned_bytes(config, 1, 500), shapes(config, calibration(CONFIG))
    assert planned_bytes(config, 1, CAPACITY) == count_bytes(state)
    signs = 4 * 32
    # rows of the three parts 2, 1, 1; two matrices and weights of 3 groups, or signs of a part
    assert planned.codecs == 4 * (2 + 1) * (2 * 32 * 32 + 3) + signs + 3 * signs
    heads, slots = 2 * 2, config.num_blocks(500)
    assert planned.key_codes == heads * slots * 32 * (2 * 32 // 8)
    assert planned.value_codes == slots * 32 * (3 + 3 + 2 + 3) * 32 // 8
    plain = replace(CONFIG, allocation=cache.Allocation((2, 3), (2, 2)))
    # of bits alone heads need no basis, and a calibration beside them is no error
    without = planned_bytes(plain, 1, CAPACITY)
    assert without == count_bytes(shapes(plain, calibration(CONFIG)))
    assert without == count_bytes(shapes(plain, None)) and without.codecs < planned.codecs
    with pytest.raises(ValueError, match=r"key\.scales: got one for all groups, expected a calib"):
        shapes(config, None)


def test_every_byte_is_counted_and_the_matrices_can_be_left_out():
    """Two matrices of a head and side, and the weights of its groups, all float32."""
    state = empty_cache(CONFIG, 1)
    planned = planned_bytes(CONFIG, 1, CAPACITY)
    assert planned == count_bytes(state) and planned.total == state.nbytes
    heads = 2 * 2
    assert planned.codecs == 4 * heads * (2 * 2 * 32 * 32 + 3 + 2)
    full, tokens = 2 * 2 * 2 * 32 * 2, 4096
    planned = planned_bytes(CONFIG, 1, tokens)
    assert compression_ratio(CONFIG, tokens) == tokens * full / planned.total
    without = compression_ratio(CONFIG, tokens, codecs=False)
    assert without == tokens * full / (planned.total - planned.codecs)
    # one word of scales a token and head, whatever the groups; 2 bits a channel and 2.5
    assert planned.scales == heads * 4 * CONFIG.num_blocks(tokens) * CONFIG.block
    assert planned.key_codes == heads * 8 * CONFIG.num_blocks(tokens) * CONFIG.block


@pytest.mark.parametrize("allocation", [None, BY_FORMAT], ids=["everywhere", "by head"])
def test_it_is_saved_with_its_matrices(allocation, tmp_path, same_bits):
    config = replace(CONFIG, allocation=allocation)
    state = empty_cache(config, 1)
    save(state, tmp_path / "cache", model="m")
    like = shapes(config, calibration(CONFIG))
    same_bits(restore(like, tmp_path / "cache", model="m"), state)
    key = replace(CONFIG.key, scales="joint_products")
    other = shapes(replace(config, key=key), calibration(CONFIG))
    with pytest.raises(ValueError, match="got config"):
        restore(other, tmp_path / "cache", model="m")


def test_what_does_not_fit_is_refused():
    known = calibration(CONFIG)
    with pytest.raises(
        ValueError, match=r"value\.scales: got one for all groups, expected a calib"
    ):
        shapes(CONFIG, Calibration(keys=known.keys))
    with pytest.raises(
        ValueError, match=r"keys: got \(2, 2, 16\) layers, .* expected \(2, 2, 32\)"
    ):
        shapes(CONFIG, identity(2, 2, 16))
    with pytest.raises(ValueError, match="calibration: got one, expected a codec with scales"):
        shapes(replace(CONFIG, key=CODEC(2), value=CODEC(2)), known)
    order = np.tile(np.arange(32, dtype=np.int32), (2, 2, 1))
    with pytest.raises(ValueError, match=r"scales: got 'joint' .* with an order of channels"):
        shapes(CONFIG, known, key_order=order)
    with pytest.raises(ValueError, match=r"value\.scale: got norm, expected least_squares"):
        replace(CONFIG, value=CODEC(2, scale="norm", scales="joint"))
    with pytest.raises(ValueError, match=r"key\.scales: got 'one', expected one of group, joint"):
        replace(CONFIG, key=CODEC(2, scales="one"))
    with pytest.raises(ValueError, match="moments: got shapes"):
        from_moments(np.eye(3), np.full((3, 3), np.nan))


@pytest.mark.parametrize("side", ["keys", "values"])
def test_kernels_read_it_and_xla_writes_it(side, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    plain = {"keys": "value", "values": "key"}[side]
    config = replace(CONFIG, **{plain: CODEC(2)})
    state = shapes(config, calibration(config))
    with pytest.raises(NotImplementedError, match="calibrated channels with one scale"):
        choose_compression(state, "pallas")
    for queries, attend in ((1, "pallas"), (4, "cudnn")):
        chosen = choose_attention(state, queries, None, attend)
        assert (chosen.attend, chosen.pages) == (attend, "pallas")
        assert chosen.compression.blocks == "xla"
