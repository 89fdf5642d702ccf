"""From full-precision keys and values to packed blocks, in one pass: one read, one write.

A program makes one block of one kv head: centre, norm, rotate, nearest level, scale, pack. The
rotation is a product with a small matrix on the tensor cores, and exact: 16-bit vectors times +-1,
or times a matrix in three 16-bit parts, summed in float32. Vectors are first brought near 1 by a
power of two, which rounds nothing.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt8, UInt32

from pallas_kernels import triton
from pallas_kernels.blocks import PAGE_TOKENS
from pallas_kernels.codebook import PLANE_WIDTHS
from pallas_kernels.dequantize import divide, power_of_two
from pallas_kernels.rotation import Rotation

ScaleMode = Literal["norm", "matched", "least_squares", "unbiased"]
# Levels of codes up to here are constants of the program, chosen by selects; others are looked up.
SELECTED = 16


@dataclasses.dataclass(frozen=True)
class Code:
    """How a group of channels is quantized: ascending levels of unit variance, and the scale."""

    levels: tuple[float, ...]
    scale: ScaleMode

    @property
    def bits(self) -> int:
        """Bits of an index."""
        return (len(self.levels) - 1).bit_length()

    @property
    def edges(self) -> tuple[float, ...]:
        """Thresholds, halfway between the levels."""
        return tuple((a + b) / 2 for a, b in zip(self.levels, self.levels[1:], strict=False))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Group:
    """The channels of one group: pool planes, as `blocks.Blocks` has them, and how to fill them.

    The rotation is one for all heads, its parts in the dtype of the vectors where that is
    bfloat16, else in float32.
    """

    planes: tuple[UInt8[Array, "pages K rows _"], ...]
    rotation: Rotation
    code: Code = dataclasses.field(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
    """Where the blocks go: groups of keys and of values, and their scales uint32 [pages, K, T]."""

    keys: tuple[Group, ...]
    values: tuple[Group, ...]
    scales: tuple[UInt32[Array, "pages K T"], ...]
    key_mean: Float[Array, "rows K H"] | None


def encode(
    keys: Float[Array, "rows slots K H"],
    values: Float[Array, "rows slots K H"],
    jobs: Int[Array, "jobs 5"],
    pool: Pool,
    *,
    interpret: bool = False,
) -> Pool:
    """Compress blocks of T tokens into pages of the pool, in place if the caller gives it away.

    Job (row, slot, page, mean, opens): the tokens in the slots of this row of keys and values, from
    `slot` on and as a ring, become this page; nothing happens if the page is negative. With a
    `key_mean`, the mean key in its row `mean` is taken off the keys; if `opens` is not 0, it is the
    mean of these T keys, and written there. No two jobs may name one page or open one mean.

    Raises ValueError for shapes that do not fit, NotImplementedError for what is not served.
    """
    tokens = _check(keys, values, jobs, pool)
    heads, channels = keys.shape[2:]

    def planes(x: jax.Array) -> Any:
        return triton.BlockSpec(
            (x.shape[0], None, *x.shape[2:]), lambda i, h: (0, h) + (0,) * (x.ndim - 2)
        )

    def whole(x: jax.Array) -> Any:
        return triton.BlockSpec(x.shape, lambda i, h: (0,) * x.ndim)

    source = triton.BlockSpec((*keys.shape[:2], None, channels), lambda i, h: (0, 0, h, 0))
    targets = {
        "keys": [group.planes for group in pool.keys],
        "values": [group.planes for group in pool.values],
        "scales": pool.scales,
    } | ({} if pool.key_mean is None else {"key_mean": pool.key_mean})
    constants = {
        "keys": [group.rotation for group in pool.keys],
        "values": [group.rotation for group in pool.values],
        "tables": [
            jnp.array([group.code.levels, (*group.code.edges, 0.0)], jnp.float32)
            for group in (*pool.keys, *pool.values)
        ],
    }
    inputs = (
        {"source_keys": keys, "source_values": values, "jobs": jobs.astype(jnp.int32)},
        constants,
        targets,
    )
    specs = (
        {
            "source_keys": source,
            "source_values": source,
            "jobs": triton.BlockSpec((None, 5), lambda i, h: (i, 0)),
        },
        jax.tree.map(whole, constants),
        jax.tree.map(planes, targets),
    )
    first = len(jax.tree.leaves(inputs[:2]))
    count = len(jax.tree.leaves(targets))
    written = triton.call(
        lambda source, constants, old, new: _encode_kernel(
            source, constants, old, new, pool=pool, tokens=tokens, channels=channels,
            interpret=interpret,
        ),
        grid=(jobs.shape[0], heads),
        in_specs=specs,
        out_specs=jax.tree.map(planes, targets),
        out_shape=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), targets),
        aliases={first + i: i for i in range(count)},
        warps=4 if tokens * power_of_two(channels) <= 4096 else 8,
        stages=1,
        name="encode",
        interpret=interpret,
    )(*inputs)  # fmt: skip
    replace = dataclasses.replace
    return Pool(
        keys=tuple(replace(g, planes=p) for g, p in zip(pool.keys, written["keys"], strict=True)),
        values=tuple(
            replace(g, planes=p) for g, p in zip(pool.values, written["values"], strict=True)
        ),
        scales=written["scales"],
        key_mean=written.get("key_mean"),
    )


def _check(keys: jax.Array, values: jax.Array, jobs: jax.Array, pool: Pool) -> int:
    """Tokens of a page, after the shapes were seen to fit."""
    pages, heads, tokens = pool.scales[0].shape
    if tokens not in PAGE_TOKENS:
        raise NotImplementedError(f"pages of {tokens} tokens: served are {PAGE_TOKENS}")
    if keys.shape != values.shape or keys.dtype != values.dtype or keys.shape[2] != heads:
        raise ValueError(
            f"got keys {keys.dtype}{list(keys.shape)} and values {values.dtype}"
            f"{list(values.shape)}, expected both [rows, slots, {heads}, H]"
        )
    if keys.shape[1] < tokens or jobs.ndim != 2 or jobs.shape[1] != 5:
        raise ValueError(
            f"got {keys.shape[1]} slots and jobs {jobs.shape}, "
            f"expected at least {tokens} slots and jobs of 5 numbers"
        )
    for side, groups in (("keys", pool.keys), ("values", pool.values)):
        total = sum(group.rotation.parts.shape[2] for group in groups)
        if total != keys.shape[3]:
            raise ValueError(f"got {side} of {keys.shape[3]} channels, expected {total}")
        for group in groups:
            dim = group.rotation.parts.shape[2]
            rows, length = (tokens, dim) if side == "keys" else (dim, tokens)
            expected = [
                (pages, heads, rows, length * w // 8) for w in PLANE_WIDTHS[group.code.bits]
            ]
            if dim % 8 or [plane.shape for plane in group.planes] != expected:
                raise ValueError(
                    f"got {side} planes {[p.shape for p in group.planes]}, expected {expected}"
                )
            if any(2**31 < plane.size <= 2**32 for plane in group.planes):
                raise NotImplementedError(
                    "a plane of more than 2**31 bytes: served are up to 2**31 and more than 2**32"
                )
    return tokens


def _encode_kernel(
    source: dict[str, Any], constants: dict[str, Any], old: dict[str, Any], new: dict[str, Any],
    *, pool: Pool, tokens: int, channels: int, interpret: bool,
) -> None:  # fmt: skip
    """One program of the grid (job, kv head)."""
    row, slot, page, mean_row, opens = (source["jobs"][i] for i in range(5))

    @triton.when(page >= 0)
    def _() -> None:
        place = slot + jnp.arange(tokens)
        slots = source["source_keys"].shape[1]
        place = jnp.where(place >= slots, place - slots, place)
        scales: list[Any] = [None] * len(new["scales"])
        for side, groups in (("keys", pool.keys), ("values", pool.values)):
            first = 0
            for g, group in enumerate(groups):
                dim = group.rotation.parts.shape[2]
                column = _Columns(dim, first)
                mask = jnp.broadcast_to(column.exists[None, :], (tokens, column.count))
                at = source[f"source_{side}"].at[row, place[:, None], column.channel[None, :]]
                x = triton.load(at, mask=mask, other=0.0)
                mean = None
                if side == "keys" and "key_mean" in new:
                    mean = _mean(x, old["key_mean"], new["key_mean"], mean_row, opens, column)
                rotation = constants[side][g]
                table = constants["tables"][g + len(pool.keys) * (side == "values")]
                index, scale = _quantize(x, mean, rotation, table, group.code, column)
                planes = zip(new[side][g], PLANE_WIDTHS[group.code.bits], strict=True)
                done = 0
                for plane, width in planes:
                    field = (index >> done) & (2**width - 1)
                    if side == "keys":
                        _store_keys(plane, page, field, width, column)
                    else:
                        _store_values(plane, page, field, width, column)
                    done += width
                bits = _bits(scale)
                word = bits << jnp.uint32(16) if side == "values" else bits
                scales[g] = word if scales[g] is None else scales[g] | word
                first += dim
        for g, word in enumerate(scales):
            triton.store(new["scales"][g].at[page, jnp.arange(tokens)], word)


@dataclasses.dataclass(frozen=True)
class _Columns:
    """Channels of a group as columns: eighths, each padded to a power of two.

    A plane of width w packs channels dim * w / 8 apart into a byte: whole eighths.
    """

    dim: int
    first: int

    @property
    def padded(self) -> int:
        return power_of_two(self.dim // 8)

    @property
    def count(self) -> int:
        return 8 * self.padded

    @property
    def within(self) -> jax.Array:
        """Position in the group of each column."""
        eighth, rest = divide(jnp.arange(self.count), self.padded)
        return eighth * (self.dim // 8) + rest

    @property
    def channel(self) -> jax.Array:
        return self.first + self.within

    @property
    def exists(self) -> jax.Array:
        return divide(jnp.arange(self.count), self.padded)[1] < self.dim // 8


def _mean(x: jax.Array, old: Any, new: Any, row: jax.Array, opens: jax.Array, column: _Columns):
    """float32 [columns]: the mean key to take off, written where a block opens it."""
    held = triton.load(old.at[row, column.channel], mask=column.exists, other=0.0)
    of_block = x.astype(jnp.float32).sum(axis=0) / x.shape[0]
    mean = jnp.where(opens != 0, of_block, held)
    triton.store(new.at[row, column.channel], mean, mask=column.exists & (opens != 0))
    return mean


def _quantize(
    x: jax.Array,
    mean: jax.Array | None,
    rotation: Rotation,
    table: Any,
    code: Code,
    column: _Columns,
) -> tuple[jax.Array, jax.Array]:
    """Indices int32 [tokens, columns] and scales float32 [tokens]; `turboquant_jax.quantizer`."""
    wide = x.astype(jnp.float32)
    centred = wide if mean is None else wide - mean[None, :]
    # the largest of the bits is the largest magnitude, and NaN is larger than all
    bits = lax.bitcast_convert_type(centred, jnp.int32) & 0x7FFFFFFF
    largest = bits.max(axis=1)
    bad = largest >= 0x7F800000
    usable = jnp.logical_not(bad) & (largest > 0)
    exponent = jnp.minimum(jnp.maximum(largest >> 23, 1), 253)
    grow = lax.bitcast_convert_type((254 - exponent) << 23, jnp.float32)
    grow = jnp.where(usable, grow, 0.0)
    shrink = lax.bitcast_convert_type(exponent << 23, jnp.float32)
    square = jnp.where(bad[:, None], 0.0, centred * grow[:, None])
    square = (square * square).sum(axis=1) / column.dim
    root = jnp.sqrt(jnp.where(usable, square, 1.0))
    near_one = jnp.where(bad[:, None], 0.0, wide * grow[:, None])
    factor = rotation.gain / root
    z = _rotate(near_one, rotation, column) * factor[:, None]
    if mean is not None:
        turned = _rotate_one(mean, rotation, column)
        z = z - turned[None, :] * (grow * factor)[:, None]
    index, level = _nearest(z, table, code)
    if column.padded * 8 != column.dim:
        level = jnp.where(jnp.broadcast_to(column.exists[None, :], z.shape), level, 0.0)
    norm = jnp.where(bad, jnp.nan, jnp.where(usable, root * shrink, 0.0))
    return index, norm * _correction(z, level, code, column)


def _rotate(x: jax.Array, rotation: Rotation, column: _Columns) -> jax.Array:
    """Pi x / gain of float32 [tokens, columns]."""
    x = (x * _signs(rotation, column)[None, :]).astype(rotation.parts.dtype)
    parts = [triton.float_dot(x, part, 1, 1) for part in _parts(rotation, column)]
    return sum(parts[1:], parts[0])


def _rotate_one(x: jax.Array, rotation: Rotation, column: _Columns) -> jax.Array:
    """Pi x / gain of float32 [columns], with sums in float32."""
    x = x * _signs(rotation, column)
    parts = [(p.astype(jnp.float32) * x[None, :]).sum(axis=1) for p in _parts(rotation, column)]
    return sum(parts[1:], parts[0])


def _signs(rotation: Rotation, column: _Columns) -> jax.Array:
    if rotation.signs is None:
        return jnp.ones((column.count,), jnp.float32)
    return triton.load(rotation.signs.at[column.within], mask=column.exists, other=0.0)


def _parts(rotation: Rotation, column: _Columns) -> list[jax.Array]:
    at, exists = column.within, column.exists
    mask = exists[:, None] & exists[None, :]
    matrix = rotation.parts
    return [
        triton.load(matrix.at[i, 0, at[:, None], at[None, :]], mask=mask, other=0.0)
        for i in range(matrix.shape[0])
    ]


def _nearest(z: jax.Array, table: Any, code: Code) -> tuple[jax.Array, jax.Array]:
    """Index and level of each coordinate; a tie goes to the lower level."""
    if len(code.levels) > SELECTED:
        index = jnp.zeros(z.shape, jnp.int32)
        for bit in reversed(range(code.bits)):
            edge = triton.load(table.at[1, index + (2**bit - 1)])
            index = index + jnp.where(z > edge, 2**bit, 0)
        return index, triton.load(table.at[0, index])
    if any(a != -b for a, b in zip(code.levels, reversed(code.levels), strict=True)):
        return _search(z, code.levels, code.edges)
    # half of the work where the levels are symmetric
    half = len(code.levels) // 2
    index, level = _search(jnp.abs(z), code.levels[half:], code.edges[half:])
    above = z > 0
    return jnp.where(above, index + half, half - 1 - index), jnp.where(above, level, -level)


def _search(
    z: jax.Array, levels: tuple[float, ...], edges: tuple[float, ...]
) -> tuple[jax.Array, jax.Array]:
    """By halves, among a power of two of levels that are spelt out in the code."""
    if not edges:
        return jnp.zeros(z.shape, jnp.int32), jnp.full(z.shape, levels[0], jnp.float32)
    passed: list[jax.Array] = []

    def choose(values: tuple[float, ...]) -> Any:
        """The value at the position that the comparisons so far lead to."""
        chosen: list[Any] = list(values)
        for above in reversed(passed):
            chosen = [
                jnp.where(above, high, low)
                for low, high in zip(chosen[::2], chosen[1::2], strict=True)
            ]
        return chosen[0]

    size, index = len(levels), jnp.zeros(z.shape, jnp.int32)
    while size > 1:
        above = z > choose(edges[size // 2 - 1 :: size])
        size //= 2
        passed.append(above)
        index = index + jnp.where(above, size, 0)
    level = choose(levels)
    return index, level.astype(jnp.float32)


def _correction(z: jax.Array, level: jax.Array, code: Code, column: _Columns) -> jax.Array:
    """s sqrt(d) / |x| of the scale mode."""
    if code.scale == "norm":
        return jnp.ones(z.shape[:1], jnp.float32)
    energy = (level * level).sum(axis=1)
    if code.scale == "matched":
        return jnp.sqrt(column.dim / energy)
    overlap = (z * level).sum(axis=1)
    if code.scale == "least_squares":
        return overlap / energy
    return jnp.where(overlap > 0, column.dim / jnp.where(overlap > 0, overlap, 1.0), 1.0)


def _store_keys(
    plane: Any, page: jax.Array, field: jax.Array, width: int, column: _Columns
) -> None:
    """Channels of a token that lie apart, in one byte."""
    tokens, per_byte = field.shape[0], 8 // width
    parts = field.reshape(tokens, per_byte, column.count // per_byte)
    shifts = width * jnp.arange(per_byte)
    packed = (parts << shifts[None, :, None]).sum(axis=1).astype(jnp.uint8)
    eighth, rest = divide(jnp.arange(packed.shape[1]), column.padded)
    byte = eighth * (column.dim // 8) + rest
    mask = jnp.broadcast_to((rest < column.dim // 8)[None, :], packed.shape)
    place: Any = plane.at[page, jnp.arange(tokens)[:, None], byte[None, :]]
    triton.store(place, packed, mask=mask)


def _store_values(
    plane: Any, page: jax.Array, field: jax.Array, width: int, column: _Columns
) -> None:
    """Tokens of a channel that lie apart, in one byte."""
    tokens, per_byte = field.shape[0], 8 // width
    parts = field.T.reshape(column.count, per_byte, tokens // per_byte)
    shifts = width * jnp.arange(per_byte)
    packed = (parts << shifts[None, :, None]).sum(axis=1).astype(jnp.uint8)
    byte = jnp.arange(packed.shape[1])
    mask = jnp.broadcast_to(column.exists[:, None], packed.shape)
    place: Any = plane.at[page, column.within[:, None], byte[None, :]]
    triton.store(place, packed, mask=mask)


def _bits(scale: jax.Array) -> jax.Array:
    """The bfloat16 of a scale in the low half of a word."""
    return lax.bitcast_convert_type(scale.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
