"""The kernel of `encode`: a program makes a few blocks of one kv head.

First the keys of all and then the values, so that a rotation stays in shared memory for as long as
it is needed. The codes of a key that share a byte are in the
registers of one thread already; those of values are packed, and transposed, by a product with a
matrix of powers of two.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.encode.pool import GroupOperand, Pool
from pallas_kernels.encode.task import GroupTask, compress, open_means
from pallas_kernels.primitives import triton
from pallas_kernels.primitives.dequantize import power_of_two
from pallas_kernels.primitives.nearest import Levels
from pallas_kernels.primitives.tile import Centre, Columns


def encode_kernel(
    source: dict[str, Any], constants: dict[str, Any], new: dict[str, Any],
    *, pool: Pool, programs: int,
) -> None:  # fmt: skip
    """One program of the grid (kv head, programs): as many jobs as any other, or one less."""
    jobs, program = constants["jobs"], triton.program_id(1)
    pages, tokens = pool.pages[1], pool.scales[0].shape[2]
    first_page = triton.program_id(0) * pages  # here: in a branch an interpreter does not know it
    total = jobs.shape[0]
    first_job = triton.program_id(0) * total if pool.scales_by_job else None
    begin, stop = (lax.div((program + i) * total, jnp.int32(programs)) for i in (0, 1))
    job = begin + jnp.arange(power_of_two(-(-total // programs)))

    centre = None
    if "key_mean" in new:
        centre = Centre(
            means=new["key_mean"],
            rotated=new.get("rotated_mean"),
            turned=new.get("turned_mean"),
            angles=constants.get("angles"),
            opening=constants.get("opening"),
            rotary=0 if pool.pre_rope is None else pool.pre_rope.rotary,
        )

    def part(side: str, g: int, group: GroupOperand, first_channel: int) -> GroupTask:
        return GroupTask(
            group=group,
            column=Columns(group.rotation.parts.shape[2], first_channel),
            levels=Levels.load(group.code.levels, constants["tables"][side][g]),
            tokens=tokens,
            jobs=jobs,
            first_page=first_page,
            first_job=first_job,
            vectors=source[side],
            parts=constants[side][g].parts,
            packing=constants["packing"][g] if side == "values" else None,
            centre=centre if side == "keys" else None,
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
                if own.centre is not None:

                    @triton.when(opens > 0)
                    def opening(own: GroupTask = own) -> None:
                        open_means(own, first, end - first)

                compress(own, first, end - first)
                channel += own.column.dim
            triton.barrier()
