"""Indices -> bytes of a page, inside the kernel that compresses.

The codes of a key that share a byte are in the registers of one thread already; those of values are
packed, and transposed, by a product with a matrix of powers of two.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.primitives import triton
from pallas_kernels.primitives.codebook import PLANE_WIDTHS
from pallas_kernels.primitives.nearest import bits_of, to_float, to_int
from pallas_kernels.primitives.tile import Columns


def packing_matrix(length: int, width: int) -> np.ndarray:
    """bf16 [length, bytes]: fields of `width` bits times this are the bytes.

    Element i of a plane of m bytes is in byte i mod m at bit width * (i // m). Sums stay below 256,
    which bfloat16 operands and float32 sums hold exactly.
    """
    count = length * width // 8
    matrix = np.zeros((length, max(16, count)), np.float32)
    place, byte = np.divmod(np.arange(length), count)
    matrix[np.arange(length), byte] = 2.0 ** (width * place)
    return matrix.astype(jnp.bfloat16)


def field_of(index: jax.Array, plane: int, bits: int) -> jax.Array:
    """The bits of an index that a plane holds; the low byte of an int32, see `to_int`."""
    widths = PLANE_WIDTHS[bits]
    return bits_of(index, sum(widths[:plane]), widths[plane]) if len(widths) > 1 else index


def join(pieces: list[jax.Array]) -> jax.Array:
    """One beside the other, a power of two of [rows, columns]."""
    while len(pieces) > 1:
        pairs = zip(pieces[::2], pieces[1::2], strict=True)
        pieces = [
            jnp.stack(pair, axis=-1).transpose(0, 2, 1).reshape(pair[0].shape[0], -1)
            for pair in pairs
        ]
    return pieces[0]


def store_keys(
    plane: Any,
    page: jax.Array,
    token: jax.Array,
    fields: list[jax.Array],
    width: int,
    column: Columns,
) -> None:
    """Fields [tokens, an eighth of the columns], packed along the columns."""
    while len(fields) > width:
        half = len(fields) // 2
        fields = [
            low + (high << half) for low, high in zip(fields[:half], fields[half:], strict=True)
        ]
    packed = join([field.astype(jnp.uint8) for field in fields])
    byte, exists = column.rotated(width)
    mask = None
    if column.dim != column.count:
        mask = jnp.broadcast_to(exists[None, :], packed.shape)
    at = cast(Any, plane.at[page, token[:, None], byte[None, :]])
    triton.store(at, packed, mask=mask)


def weights(matrix: Any, token: jax.Array) -> jax.Array:
    """bf16 [tokens, bytes]: the rows of a `packing_matrix` that belong to these tokens."""
    byte = jnp.arange(matrix.shape[1])
    return triton.load(matrix.at[token[:, None], byte[None, :]])


def pack(field: jax.Array, weights: jax.Array) -> jax.Array:
    """float32 [columns, bytes]: fields [tokens, columns], packed along the tokens.

    A product with a small matrix, which also transposes.
    """
    return triton.float_dot(to_float(field).astype(jnp.bfloat16), weights, 0, 0)


def store_values(plane: Any, page: jax.Array, packed: jax.Array, column: Columns) -> None:
    """Bytes [columns, bytes] as float32."""
    channel, exists = column.rotated()
    byte = jnp.arange(packed.shape[1])
    mask = None
    if column.dim != column.count or plane.shape[-1] != packed.shape[1]:
        mask = exists[:, None] & (byte < plane.shape[-1])[None, :]
    at = cast(Any, plane.at[page, channel[:, None], byte[None, :]])
    triton.store(at, to_int(packed).astype(jnp.uint8), mask=mask)
