"""The GPU kernel's view of compression: which blocks of a source become which pages."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels import encode as kernel
from turboquant_jax.cache import kernel_operands
from turboquant_jax.cache.blocks import Blocks
from turboquant_jax.cache.kernel_operands import flat
from turboquant_jax.cache.state import Cache, Exact, LayerRows, Part, heads_of
from turboquant_jax.quantizers.quantizer import Quantizer


def encode_window(
    cache: Cache, start: Int[Array, " B"], page: Int[Array, " B"], opens: Bool[Array, " B"]
) -> Cache:
    """Compress a block of each sequence's window, in all layers.

    It begins in slot `start` and becomes this page, or nothing if that is negative; it is the
    sequence's first if it `opens`.
    """
    batch, heads = start.shape[0], cache.kv_heads
    window = jax.tree.map(flat, cache.window)
    for number in range(len(cache.parts)):
        layers = [layer for layer, head in heads_of(cache.config, number, heads) if head == 0]
        layer = jnp.asarray(layers, jnp.int32)[:, None]
        source = layer * batch + jnp.arange(batch, dtype=jnp.int32)[None, :]
        row = heads * jnp.arange(len(layers), dtype=jnp.int32)[:, None]
        columns = source, start[None], _through_rows(cache, row, page[None]), source, opens[None]
        cache = encode_jobs(cache, number, window, _jobs(*jnp.broadcast_arrays(*columns)))
    return cache


def encode_chunk(
    cache: Cache,
    rows: LayerRows,
    block: Exact,
    page: Int[Array, "B n"],
    opens: Bool[Array, " B"],
) -> Cache:
    """Compress blocks [B, n, T, K, H] of each sequence, in one layer; see `encode_window`."""
    (member,) = rows.members
    batch, count = page.shape
    source = jax.tree.map(lambda x: x.reshape(batch, -1, *x.shape[3:]), block)
    row = jnp.arange(batch, dtype=jnp.int32)[:, None]
    start = cache.config.block * jnp.arange(count, dtype=jnp.int32)[None, :]
    page = _through_rows(cache, member.first, page)
    columns = jnp.broadcast_arrays(row, start, page, rows.layer * batch + row)
    first, rest = ([column[:, part] for column in columns] for part in (slice(1), slice(1, None)))
    # a sequence's first block alone: the kernel takes its mean, which the next ones need
    cache = encode_jobs(cache, member.part, source, _jobs(*first, opens))
    if count == 1:
        return cache
    return encode_jobs(cache, member.part, source, _jobs(*rest, jnp.zeros_like(rest[0])))


def encode_jobs(cache: Cache, number: int, source: Exact, jobs: Int[Array, "jobs 5"]) -> Cache:
    """Compress blocks of `source`, [rows, slots, K, H], into pages; see `kernel.encode`."""
    part, dtype = cache.parts[number], source.keys.dtype
    pool = kernel.Pool(
        keys=_groups(part.codecs[0].groups, part.pool.keys, dtype),
        values=_groups(part.codecs[1].groups, part.pool.values, dtype),
        scales=part.pool.scales,
        key_mean=None if cache.key_mean is None else flat(cache.key_mean),
    )
    made = kernel.encode(source.keys, source.values, jobs, pool)
    found = Blocks(
        tuple(group.planes for group in made.keys),
        tuple(group.planes for group in made.values),
        made.scales,
    )
    parts = list(cache.parts)
    parts[number] = Part(part.codecs, found)
    cache = replace(cache, parts=tuple(parts))
    if cache.key_mean is None or made.key_mean is None:
        return cache
    return replace(cache, key_mean=made.key_mean.reshape(cache.key_mean.shape))


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
