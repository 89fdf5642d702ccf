"""Packed layouts against their definition, written out one element at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from turboquant_jax.quantizers import packing

COUNTS = [1, 9, 96, 127]
PACK = jax.jit(packing.pack, static_argnums=1)
UNPACK = jax.jit(packing.unpack, static_argnums=(1, 2))


def by_definition(indices: np.ndarray, bits: int) -> list[np.ndarray]:
    """Element i of a plane of width w and m bytes sits in byte i mod m, at bit w * (i // m)."""
    planes, low = [], 0
    for width in [w for w in (8, 4, 2, 1) if bits & w]:
        size = -(-len(indices) * width // 8)
        plane = [0] * size
        for i, index in enumerate(indices.tolist()):
            plane[i % size] += ((index >> low) % 2**width) << (width * (i // size))
        planes.append(np.array(plane, np.uint8))
        low += width
    return planes


def random_indices(count: int, bits: int, batch: tuple[int, ...] = ()) -> np.ndarray:
    rng = np.random.default_rng(1000 * count + bits)
    return rng.integers(0, 2**bits, (*batch, count), dtype=np.uint8)


def assert_layout(pack, count: int, bits: int) -> None:
    indices = random_indices(count, bits)
    for got, expected in zip(
        pack(jnp.asarray(indices), packing.widths(bits)),
        by_definition(indices, bits),
        strict=True,
    ):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_layout_is_the_definition(bits, count):
    assert_layout(PACK, count, bits)


def swapped(planes: packing.Planes) -> packing.Planes:
    return tuple((plane << jnp.uint8(4)) | (plane >> jnp.uint8(4)) for plane in planes)


def test_swapped_nibbles_are_noticed():
    with pytest.raises(AssertionError):
        assert_layout(lambda *args: swapped(PACK(*args)), 128, 4)
    indices = random_indices(128, 4)
    planes = swapped(packing.pack(jnp.asarray(indices), (4,)))
    assert not np.array_equal(packing.unpack(planes, (4,), 128), indices)


@pytest.mark.parametrize("bits", range(1, 9))
def test_unpack_inverts_pack(bits):
    widths = packing.widths(bits)
    indices = random_indices(83, bits, (2, 1, 3))
    planes = PACK(jnp.asarray(indices), widths)
    assert [p.shape for p in planes] == [(2, 1, 3, packing.plane_bytes(83, w)) for w in widths]
    np.testing.assert_array_equal(UNPACK(planes, widths, 83), indices)


def test_leading_shapes_may_be_missing_empty_or_mapped():
    indices = jnp.asarray(random_indices(12, 7, (4,)))
    planes = PACK(indices, (4, 2, 1))
    for other in (
        jax.vmap(lambda row: packing.pack(row, (4, 2, 1)))(indices),
        tuple(jnp.stack(rows) for rows in zip(*(PACK(row, (4, 2, 1)) for row in indices))),
    ):
        for plane, again in zip(planes, other, strict=True):
            np.testing.assert_array_equal(plane, again)
    empty = PACK(indices[:0], (4, 2, 1))
    assert [plane.shape for plane in empty] == [(0, 6), (0, 3), (0, 2)]
    assert UNPACK(empty, (4, 2, 1), 12).shape == (0, 12)


@pytest.mark.parametrize("bits", range(1, 9))
def test_no_bit_is_wasted(bits):
    """128 coordinates at b bits are 16 b bytes, at 3, 5, 6 and 7 bits too."""
    assert sum(packing.widths(bits)) == bits
    assert sum(packing.plane_bytes(128, width) for width in packing.widths(bits)) == 16 * bits


def test_bad_arguments_are_named():
    for bits in (0, 9):
        with pytest.raises(ValueError, match=f"bits: got {bits}, expected between 1 and 8"):
            packing.widths(bits)
    planes = packing.pack(jnp.zeros(64, jnp.uint8), (4,))
    with pytest.raises(ValueError, match=r"got \[32\] bytes, expected \[40\] for 80 elements"):
        packing.unpack(planes, (4,), 80)
    with pytest.raises(ValueError, match=r"got \[32\] bytes, expected \[32, 8\]"):
        packing.unpack(planes, (4, 1), 64)
