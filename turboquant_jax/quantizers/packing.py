"""b-bit indices <-> bytes: the layouts of every packed array, written down once.

An index of b bits is cut, from its low end, into *planes* whose widths are powers of two: the
binary digits of b in descending order (3 = 2 + 1, 7 = 4 + 2 + 1). A plane of width w over n
elements has m = ceil(n w / 8) bytes, and element i sits

    in byte  i mod m,  at bit  w * (i // m).

So 4 bits split the elements in halves, 2 bits in quarters and 1 bit in eighths, every byte holds
elements m apart, and unpacking is a shift and a mask without any interleaving. Nothing is wasted
beyond the last byte of a plane.
"""

import jax.numpy as jnp
from jaxtyping import Array, UInt8

from turboquant_jax.quantizers.formats import Widths as Widths
from turboquant_jax.quantizers.formats import plane_bytes as plane_bytes
from turboquant_jax.quantizers.formats import widths as widths

Planes = tuple[UInt8[Array, "*batch _"], ...]


def pack(indices: UInt8[Array, "*batch n"], plane_widths: Widths) -> Planes:
    """Pack indices along the last axis, into one array [*batch, plane_bytes(n, w)] per width."""
    count = indices.shape[-1]
    planes, shift = [], 0
    for width in plane_widths:
        size, per_byte = plane_bytes(count, width), 8 // width
        field = (indices >> jnp.uint8(shift)) & jnp.uint8(2**width - 1)
        padding = [(0, 0)] * (indices.ndim - 1) + [(0, size * per_byte - count)]
        parts = jnp.pad(field, padding).reshape(*indices.shape[:-1], per_byte, size)
        byte = jnp.zeros_like(parts[..., 0, :])
        for k in range(per_byte):
            byte = byte | (parts[..., k, :] << jnp.uint8(width * k))
        planes.append(byte)
        shift += width
    return tuple(planes)


def unpack(planes: Planes, plane_widths: Widths, count: int) -> UInt8[Array, "*batch n"]:
    """Invert `pack`: the first `count` indices along the last axis.

    Raises:
      ValueError: planes that do not belong to these widths and this count.
    """
    expected = [plane_bytes(count, width) for width in plane_widths]
    if [plane.shape[-1] for plane in planes] != expected:
        raise ValueError(
            f"planes: got {[plane.shape[-1] for plane in planes]} bytes, "
            f"expected {expected} for {count} elements and widths {plane_widths}"
        )
    indices, shift = jnp.uint8(0), 0
    for plane, width in zip(planes, plane_widths, strict=True):
        mask = jnp.uint8(2**width - 1)
        parts = [(plane >> jnp.uint8(width * k)) & mask for k in range(8 // width)]
        field = jnp.concatenate(parts, axis=-1)[..., :count]
        indices = indices | (field << jnp.uint8(shift))
        shift += width
    return indices
