"""From full-precision keys and values to packed blocks, in one pass: one read, one write.

A program makes one block of one kv head: `quantize`, then pack, which is a product with a matrix
too, of fields times powers of two.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt8, UInt32

from pallas_kernels import triton
from pallas_kernels.blocks import PAGE_TOKENS, check_planes
from pallas_kernels.codebook import PLANE_WIDTHS
from pallas_kernels.dequantize import power_of_two
from pallas_kernels.quantize import Code, Columns, quantize
from pallas_kernels.rotation import Rotation

# Tokens that a program has in registers at a time.
TILE = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Group:
    """The channels of one group: pool planes, as `blocks.Blocks` has them, and how to fill them.

    The rotation is one for all heads and has no signs apart; its parts have the dtype of the
    vectors where that is bfloat16, else float32.
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
        "keys_packing": [
            [packing_matrix(g.rotation.parts.shape[2], w) for w in PLANE_WIDTHS[g.code.bits]]
            for g in pool.keys
        ],
        "values_packing": [
            [packing_matrix(tokens, w) for w in PLANE_WIDTHS[g.code.bits]] for g in pool.values
        ],
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
            source, constants, old, new, pool=pool, tokens=tokens, interpret=interpret,
        ),
        grid=(jobs.shape[0], heads),
        in_specs=specs,
        out_specs=jax.tree.map(planes, targets),
        out_shape=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), targets),
        aliases={first + i: i for i in range(count)},
        warps=4,
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
            if dim % 8:
                raise ValueError(f"got a group of {dim} channels, expected a multiple of 8")
            rows, length = (tokens, dim) if side == "keys" else (dim, tokens)
            widths = PLANE_WIDTHS[group.code.bits]
            check_planes(side, group.planes, widths, (pages, heads, rows), length)
    return tokens


def _encode_kernel(
    source: dict[str, Any], constants: dict[str, Any], old: dict[str, Any], new: dict[str, Any],
    *, pool: Pool, tokens: int, interpret: bool,
) -> None:  # fmt: skip
    """One program of the grid (job, kv head)."""
    row, slot, page, mean_row, opens = (source["jobs"][i] for i in range(5))

    tile = min(TILE, tokens)

    @triton.when(page >= 0)
    def _() -> None:
        words: dict[tuple[int, int], jax.Array] = {}
        for side, groups in (("keys", pool.keys), ("values", pool.values)):
            first = 0
            for g, group in enumerate(groups):
                column = Columns(group.rotation.parts.shape[2], first)

                def vectors(start: int, side: str = side, column: Columns = column) -> jax.Array:
                    return _load(source[f"source_{side}"], row, slot + start, tile, column)

                mean = None
                if side == "keys" and "key_mean" in new:
                    means = old["key_mean"], new["key_mean"]
                    mean = _mean(vectors, tokens, means, mean_row, opens, column)
                table = constants["tables"][g + len(pool.keys) * (side == "values")]
                widths = PLANE_WIDTHS[group.code.bits]
                packing, planes = constants[f"{side}_packing"][g], new[side][g]
                packed: list[Any] = [0.0] * len(widths)
                for start in range(0, tokens, tile):
                    index, scale = quantize(
                        vectors(start), mean, constants[side][g], table, group.code, column,
                        interpret,
                    )  # fmt: skip
                    bits = _bits(scale)
                    bits = bits << jnp.uint32(16) if side == "values" else bits
                    words[g, start] = bits | words.get((g, start), jnp.uint32(0))
                    for i, width in enumerate(widths):
                        field = (index >> sum(widths[:i])) & (2**width - 1)
                        if side == "values":
                            packed[i] = packed[i] + _pack(field, packing[i], start, 0)
                        else:
                            _store(planes[i], page, start, _pack(field, packing[i], 0, 1), tile)
                if side == "values":
                    for plane, whole in zip(planes, packed, strict=True):
                        _store(plane, page, 0, whole, column.dim)
                first += column.dim
        for (g, start), word in words.items():
            triton.store(new["scales"][g].at[page, start + jnp.arange(tile)], word)


def _load(source: Any, row: jax.Array, slot: jax.Array, count: int, column: Columns) -> jax.Array:
    """Vectors [tokens, columns] from a ring of slots."""
    place = slot + jnp.arange(count)
    place = jnp.where(place >= source.shape[1], place - source.shape[1], place)
    mask = jnp.broadcast_to(column.exists[None, :], (count, column.count))
    at = source.at[row, place[:, None], column.channel[None, :]]
    return triton.load(at, mask=mask, other=0.0)


def packing_matrix(length: int, width: int) -> np.ndarray:
    """bf16 [padded length, padded bytes]: fields of `width` bits times this are the bytes.

    Element i of a plane of m bytes is in byte i mod m at bit width * (i // m). Sums stay below 256,
    which bfloat16 operands and float32 sums hold exactly.
    """
    count = length * width // 8
    shape = (max(16, power_of_two(length)), max(16, power_of_two(count)))
    matrix = np.zeros(shape, np.float32)
    place, byte = np.divmod(np.arange(length), count)
    matrix[np.arange(length), byte] = 2.0 ** (width * place)
    return matrix.astype(jnp.bfloat16)


def _mean(
    vectors: Callable[[int], jax.Array],
    tokens: int,
    means: tuple[Any, Any],
    row: jax.Array,
    opens: jax.Array,
    column: Columns,
) -> jax.Array:
    """float32 [columns]: the mean key to take off, written where a block opens it."""
    old, new = means
    held = triton.load(old.at[row, column.channel], mask=column.exists, other=0.0)

    def of_block() -> jax.Array:
        tiles = [
            vectors(i).astype(jnp.float32).sum(axis=0) for i in range(0, tokens, min(TILE, tokens))
        ]
        return sum(tiles[1:], tiles[0]) / tokens

    mean = lax.cond(opens != 0, of_block, lambda: held)
    triton.store(new.at[row, column.channel], mean, mask=column.exists & (opens != 0))
    return mean


def _pack(field: jax.Array, matrix: Any, start: int, axis: int) -> jax.Array:
    """Bytes as float32: fields [tokens, columns] packed along an axis, elements from `start` on."""
    element, byte = start + jnp.arange(field.shape[axis]), jnp.arange(matrix.shape[1])
    weights = triton.load(matrix.at[element[:, None], byte[None, :]])
    return triton.float_dot(field.astype(jnp.bfloat16), weights, axis, 0)


def _store(plane: Any, page: jax.Array, start: int, packed: jax.Array, rows: int) -> None:
    """Bytes [rows, bytes] into the rows of a page from `start` on."""
    row, byte = jnp.arange(packed.shape[0]), jnp.arange(packed.shape[1])
    mask = (row < rows)[:, None] & (byte < plane.shape[-1])[None, :]
    at = cast(Any, plane.at[page, start + row[:, None], byte[None, :]])
    triton.store(at, packed.astype(jnp.int32).astype(jnp.uint8), mask=mask)


def _bits(scale: jax.Array) -> jax.Array:
    """The bfloat16 of a scale in the low half of a word."""
    return lax.bitcast_convert_type(scale.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
