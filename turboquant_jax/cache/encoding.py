"""The GPU kernel's view of compression: which blocks of a source become which pages."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32

from pallas_kernels import encode as kernel
from turboquant_jax.cache import kernel_operands, pre_rope
from turboquant_jax.cache.blocks import Blocks, shortened
from turboquant_jax.cache.kernel_operands import flat
from turboquant_jax.cache.state import Cache, Exact, LayerRows, Part, heads_of
from turboquant_jax.quantizers.quantizer import Quantizer


def encode_window(
    cache: Cache, start: Int[Array, " B"], page: Int[Array, " B"], number: Int[Array, " B"]
) -> Cache:
    """Compress a block of each sequence's window, in all layers.

    It begins in slot `start` and becomes this page, or nothing if that is negative; of the blocks
    of the sequence it has this number.
    """
    batch, heads = start.shape[0], cache.kv_heads
    window = jax.tree.map(flat, cache.window)
    for part in range(len(cache.parts)):
        layers = [layer for layer, head in heads_of(cache.config, part, heads) if head == 0]
        layer = jnp.asarray(layers, jnp.int32)[:, None]
        source = layer * batch + jnp.arange(batch, dtype=jnp.int32)[None, :]
        row = heads * jnp.arange(len(layers), dtype=jnp.int32)[:, None]
        columns = source, start[None], _through_rows(cache, row, page[None]), source, number[None]
        cache = encode_jobs(cache, part, window, _jobs(*jnp.broadcast_arrays(*columns)))
    return cache


def encode_chunk(
    cache: Cache,
    rows: LayerRows,
    block: Exact,
    page: Int[Array, "B n"],
    number: Int[Array, "B n"],
) -> Cache:
    """Compress blocks [B, n, T, K, H] of each sequence, in one layer; see `encode_window`."""
    (member,) = rows.members
    batch, count = page.shape
    source = jax.tree.map(lambda x: x.reshape(batch, -1, *x.shape[3:]), block)
    row = jnp.arange(batch, dtype=jnp.int32)[:, None]
    start = cache.config.block * jnp.arange(count, dtype=jnp.int32)[None, :]
    page = _through_rows(cache, member.first, page)
    columns = jnp.broadcast_arrays(row, start, page, rows.layer * batch + row, number)
    first, rest = ([column[:, part] for column in columns] for part in (slice(1), slice(1, None)))
    # a sequence's first block alone: the kernel takes its mean, which the next ones need
    cache = encode_jobs(cache, member.part, source, _jobs(*first))
    if count == 1:
        return cache
    return encode_jobs(cache, member.part, source, _jobs(*rest))


def encode_jobs(cache: Cache, number: int, source: Exact, jobs: Int[Array, "jobs 5"]) -> Cache:
    """Compress blocks of `source`, [rows, slots, K, H], into pages.

    Jobs (row, slot, page, mean, block of the sequence): see `kernel.encode`.
    """
    part, dtype = cache.parts[number], source.keys.dtype
    short, scales = bool(part.pool.bases), part.pool.scales
    if short:
        shape = (source.keys.shape[2], jobs.shape[0], scales[0].shape[2])
        scales = tuple(jnp.zeros(shape, jnp.uint32) for _ in scales)
    pool = kernel.Pool(
        keys=_groups(part.codecs[0].groups, part.pool.keys, dtype),
        values=_groups(part.codecs[1].groups, part.pool.values, dtype),
        scales=scales,
        key_mean=None if cache.key_mean is None else flat(cache.key_mean),
        pre_rope=_pre_rope(cache, jobs),
        scales_by_job=short,
    )
    index = jobs[:, 4:] * cache.config.block
    opens = (index == 0) & (cache.share is None)  # those of shares are there before
    columns = jobs[:, :4], opens, index % pre_rope.PERIOD
    jobs = jnp.concatenate([column.astype(jnp.int32) for column in columns], axis=1)
    made = kernel.encode(source.keys, source.values, jobs, pool)
    written, bases = made.scales, part.pool.bases
    if short:
        written, bases = _put_short_scales(part.pool, made.scales, jobs[:, 2])
    keys, values = (tuple(group.planes for group in side) for side in (made.keys, made.values))
    found = Blocks(keys, values, written, bases=bases)
    parts = list(cache.parts)
    parts[number] = Part(part.codecs, found)
    cache = replace(cache, parts=tuple(parts))
    if cache.key_mean is None or made.key_mean is None:
        return cache
    return replace(cache, key_mean=made.key_mean.reshape(cache.key_mean.shape))


def _put_short_scales(
    pool: Blocks, words: tuple[UInt32[Array, "K jobs T"], ...], page: Int[Array, " jobs"]
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Scales and bases of the pool with those of these words in the pages of the jobs."""
    heads, (rows, pages, _) = words[0].shape[0], pool.scales[0].shape
    place = page[None, :] + pages * jnp.arange(heads, dtype=jnp.int32)[:, None]
    place = jnp.where(page[None, :] < 0, rows * pages, place)  # past the end: dropped

    def put(old: Array, new: Array) -> Array:
        lines = old.reshape(rows * pages, *old.shape[2:])
        return lines.at[place].set(new, mode="drop").reshape(old.shape)

    scales, bases = zip(*map(shortened, words), strict=True)
    return tuple(map(put, pool.scales, scales)), tuple(map(put, pool.bases, bases))


def _pre_rope(cache: Cache, jobs: Int[Array, "jobs 5"]) -> kernel.PreRopeOperand | None:
    """The mean of each job, turned to its periods."""
    phases, block = cache.phases, cache.config.block
    if phases is None or cache.key_mean is None:
        return None
    angle = partial(pre_rope.signed_angles, rotary=phases.rotary)
    periods = jnp.arange(-(-block // pre_rope.PERIOD), dtype=jnp.int32)
    first = jobs[:, 4:] * block // pre_rope.PERIOD
    mean = flat(cache.key_mean)[jobs[:, 3]]
    turned = pre_rope.mean_of_period(mean, phases, first + periods[None])
    turned = turned.reshape(-1, *turned.shape[2:])
    return kernel.PreRopeOperand(
        angles=angle(phases.within),
        opening=angle(pre_rope.angles_at(phases, jnp.arange(block, dtype=jnp.int32))),
        turned=jnp.stack([turned, pre_rope.swap_pairs(turned, phases.rotary)], axis=2),
        rotary=phases.rotary,
    )


def _through_rows(cache: Cache, row: Array, page: Array) -> Array:
    """Pages of a row, counted through the rows before it; negative ones as they are."""
    return jnp.where(page < 0, page, page + row * cache.table.references.shape[0])


def _jobs(*columns: Array) -> Int[Array, "jobs 5"]:
    return jnp.stack([column.astype(jnp.int32).ravel() for column in columns], axis=1)


def _groups(groups: tuple[Quantizer, ...], planes: tuple, dtype) -> tuple[kernel.GroupOperand, ...]:
    return tuple(
        kernel.GroupOperand(
            own,
            kernel_operands.with_signs(kernel_operands.of_rotation(group.rotation, dtype)),
            kernel.CodeOperand(group.levels, group.scale),
        )
        for group, own in zip(groups, planes, strict=True)
    )
