"""Keys and values as packed blocks: the call."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.encode.kernel import encode_kernel
from pallas_kernels.encode.pool import GroupOperand, Pool, check
from pallas_kernels.primitives import triton
from pallas_kernels.primitives.blocks import flat
from pallas_kernels.primitives.codebook import PLANE_WIDTHS
from pallas_kernels.primitives.nearest import table
from pallas_kernels.primitives.packing import packing_matrix

# Programs, each of which loads the rotations: the three that each of 132 multiprocessors has room
# for, so that all run at once.
PROGRAMS = 396


def encode(
    keys: Float[Array, "rows slots K H"],
    values: Float[Array, "rows slots K H"],
    jobs: Int[Array, "jobs 6"],
    pool: Pool,
) -> Pool:
    """Compress blocks of T tokens into pages of the pool, in place if the caller gives it away.

    Job (row, slot, page, mean, opens, place): the tokens in the slots of this row of keys and
    values, from `slot` on and as a ring, become this page of the first head's row of the pool,
    counted through the rows before it, and the same page of the next rows for the other heads;
    nothing happens if it is negative. With a `key_mean`, the mean key in its row `mean` is taken
    off the keys; if `opens` is not 0, it is the mean of these T keys, and written there. No two
    jobs may name one page or open one mean. A mean before RoPE is turned to the places of the
    tokens, of which the first is `place` in its period of 64.

    Raises ValueError for shapes that do not fit, NotImplementedError for what is not served.
    """
    tokens = check(keys, values, jobs, pool)
    heads, channels = keys.shape[2:]
    programs = max(1, min(jobs.shape[0], PROGRAMS // heads))

    def of_head(x: jax.Array) -> Any:
        return triton.BlockSpec(
            (x.shape[0], None, *x.shape[2:]), lambda h, i: (0, h) + (0,) * (x.ndim - 2)
        )

    def whole(x: jax.Array) -> Any:
        return triton.BlockSpec(x.shape, lambda h, i: (0,) * x.ndim)

    source = triton.BlockSpec((*keys.shape[:2], None, channels), lambda h, i: (0, 0, h, 0))
    targets: dict[str, Any] = {
        "keys": [tuple(map(flat, group.planes)) for group in pool.keys],
        "values": [tuple(map(flat, group.planes)) for group in pool.values],
        "scales": tuple(map(flat, pool.scales)),
    }
    target_specs = jax.tree.map(whole, targets)
    if pool.key_mean is not None:
        # what is made of them, too, since a block that opens one writes both
        means = {"key_mean": pool.key_mean}
        if pool.pre_rope is None:
            rotated = pool.rotated_mean
            means["rotated_mean"] = (
                rotated_means(pool.key_mean, pool.keys) if rotated is None else rotated
            )
        else:
            means["turned_mean"] = pool.pre_rope.turned
        targets |= means
        target_specs |= jax.tree.map(of_head, means)
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
    if pool.pre_rope is not None:
        constants |= {"angles": pool.pre_rope.angles, "opening": pool.pre_rope.opening}
    vectors: dict[str, Any] = {"keys": keys, "values": values}
    inputs = (vectors, constants, targets)
    specs = (
        jax.tree.map(lambda x: source, vectors),
        jax.tree.map(whole, constants),
        target_specs,
    )
    first = len(jax.tree.leaves(inputs[:2]))
    written = triton.call(
        lambda source, constants, old, new: encode_kernel(
            source, constants, new, pool=pool, programs=programs
        ),
        # heads side by side: they lie together in memory
        triton.Launch((heads, programs), warps=4, stages=1),
        in_specs=specs,
        out_specs=target_specs,
        out_shape=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), targets),
        aliases={first + i: i for i in range(len(jax.tree.leaves(targets)))},
        name="encode",
    )(*inputs)  # fmt: skip

    def filled(groups: tuple[GroupOperand, ...], planes: list) -> tuple[GroupOperand, ...]:
        return tuple(
            dataclasses.replace(g, planes=tuple(map(as_before, p, g.planes)))
            for g, p in zip(groups, planes, strict=True)
        )

    return Pool(
        keys=filled(pool.keys, written["keys"]),
        values=filled(pool.values, written["values"]),
        scales=tuple(map(as_before, written["scales"], pool.scales)),
        key_mean=written.get("key_mean"),
        rotated_mean=None if pool.rotated_mean is None else written["rotated_mean"],
        scales_by_job=pool.scales_by_job,
    )


def as_before(new: jax.Array, old: jax.Array) -> jax.Array:
    """An array in the shape of another."""
    return new.reshape(old.shape)


def rotated_means(
    means: Float[Array, "rows K H"], groups: tuple[GroupOperand, ...]
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
