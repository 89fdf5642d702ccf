"""From full-precision keys and values to packed blocks, in one pass: one read, one write.

A program makes a few blocks of one kv head, the keys of all and then the values, so that a rotation
stays in shared memory for as long as it is needed. The codes of a key that share a byte are in the
registers of one thread already; those of values are packed, and transposed, by a product with a
matrix of powers of two.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels import triton
from pallas_kernels.blocks import PAGE_TOKENS, check_planes
from pallas_kernels.codebook import PLANE_WIDTHS
from pallas_kernels.dequantize import power_of_two
from pallas_kernels.encode_kernel import Group, Part, compress, open_means
from pallas_kernels.nearest import Levels, table
from pallas_kernels.packing import packing_matrix
from pallas_kernels.tile import Columns

# Programs, each of which loads the rotations: the three that each of 132 multiprocessors has room
# for, so that all run at once.
PROGRAMS = 396


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
    programs = max(1, min(jobs.shape[0], PROGRAMS // heads))

    def planes(x: jax.Array) -> Any:
        return triton.BlockSpec(
            (x.shape[0], None, *x.shape[2:]), lambda h, i: (0, h) + (0,) * (x.ndim - 2)
        )

    def whole(x: jax.Array) -> Any:
        return triton.BlockSpec(x.shape, lambda h, i: (0,) * x.ndim)

    source = triton.BlockSpec((*keys.shape[:2], None, channels), lambda h, i: (0, 0, h, 0))
    targets: dict[str, Any] = {
        "keys": [group.planes for group in pool.keys],
        "values": [group.planes for group in pool.values],
        "scales": pool.scales,
    }
    if pool.key_mean is not None:
        # the rotated ones, too, since a block that opens one writes both
        rotated = rotated_means(pool.key_mean, pool.keys)
        targets |= {"key_mean": pool.key_mean, "rotated_mean": rotated}
    constants = {
        "jobs": jobs.astype(jnp.int32),
        "keys": [group.rotation for group in pool.keys],
        "values": [group.rotation for group in pool.values],
        "packing": [
            [packing_matrix(tokens, w) for w in PLANE_WIDTHS[group.code.bits]]
            for group in pool.values
        ],
        "tables": {
            side: [jnp.asarray(table(group.code.levels)) for group in groups]
            for side, groups in (("keys", pool.keys), ("values", pool.values))
        },
    }
    vectors: dict[str, Any] = {"keys": keys, "values": values}
    inputs = (vectors, constants, targets)
    specs = (
        jax.tree.map(lambda x: source, vectors),
        jax.tree.map(whole, constants),
        jax.tree.map(planes, targets),
    )
    first = len(jax.tree.leaves(inputs[:2]))
    written = triton.call(
        lambda source, constants, old, new: _encode_kernel(
            source, constants, new, pool=pool, tokens=tokens, programs=programs
        ),
        # heads side by side: they lie together in memory
        grid=(heads, programs),
        in_specs=specs,
        out_specs=jax.tree.map(planes, targets),
        out_shape=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), targets),
        aliases={first + i: i for i in range(len(jax.tree.leaves(targets)))},
        warps=4,
        stages=1,
        name="encode",
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


def rotated_means(
    means: Float[Array, "rows K H"], groups: tuple[Group, ...]
) -> Float[Array, "rows K H"]:
    """Pi mean / gain, group by group."""
    rotated, first = [], 0
    for group in groups:
        matrix = group.rotation.parts[:, 0].astype(jnp.float32).sum(axis=0)
        own = means[..., first : first + matrix.shape[1]]
        # a product, not a sum of products: of many rows XLA takes minutes to compile that
        rotated.append(jnp.einsum("rkh,oh->rko", own, matrix, precision=lax.Precision.HIGHEST))
        first += matrix.shape[1]
    return jnp.concatenate(rotated, axis=-1)


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
    source: dict[str, Any], constants: dict[str, Any], new: dict[str, Any],
    *, pool: Pool, tokens: int, programs: int,
) -> None:  # fmt: skip
    """One program of the grid (kv head, programs): as many jobs as any other, or one less."""
    jobs, program = constants["jobs"], triton.program_id(1)
    total = jobs.shape[0]
    begin, stop = (lax.div((program + i) * total, jnp.int32(programs)) for i in (0, 1))
    job = begin + jnp.arange(power_of_two(-(-total // programs)))

    def part(side: str, g: int, group: Group, first_channel: int) -> Part:
        centred = side == "keys" and "key_mean" in new
        return Part(
            group=group,
            column=Columns(group.rotation.parts.shape[2], first_channel),
            levels=Levels.load(group.code.levels, constants["tables"][side][g]),
            tokens=tokens,
            jobs=jobs,
            vectors=source[side],
            parts=constants[side][g].parts,
            packing=constants["packing"][g] if side == "values" else None,
            means=new["key_mean"] if centred else None,
            rotated_means=new["rotated_mean"] if centred else None,
            planes=new[side][g],
            scales=new["scales"][g],
            shared=side == "values" and g < len(pool.keys),
        )

    def each(column: int) -> jax.Array:
        return triton.load(jobs.at[jnp.minimum(job, total - 1), column])

    filled = (job < stop) & (each(2) >= 0)
    opens = triton.uniform(jnp.where(filled & (each(4) != 0), 1, 0).max())
    # from the first job that fills a page to the last one
    first = triton.uniform(jnp.where(filled, job, total).min())
    end = triton.uniform(jnp.where(filled, job + 1, 0).max())

    @triton.when(first < end)
    def filled_ones() -> None:
        for side, groups in (("keys", pool.keys), ("values", pool.values)):
            channel = 0
            for g, group in enumerate(groups):
                own = part(side, g, group, channel)
                if own.means is not None:

                    @triton.when(opens > 0)
                    def opening(own: Part = own) -> None:
                        open_means(own, first, end - first)

                compress(own, first, end - first)
                channel += own.column.dim
            triton.barrier()
