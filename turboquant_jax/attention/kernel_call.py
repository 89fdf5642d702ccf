"""A cache as operands of the decode kernel: everything as it lies in the cache, nothing copied."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_attention import (
    BlocksOperand,
    ExactOperand,
    ExactPlaces,
    PagedBlocks,
    RotationOperand,
    Sketch,
)
from pallas_kernels.rope import rotate as rotate_in_kernel
from turboquant_jax.attention.head_rotation import rotate_by_member, rotate_queries
from turboquant_jax.cache import kernel_operands
from turboquant_jax.cache.codec import Codec
from turboquant_jax.cache.kernel_operands import flat
from turboquant_jax.cache.layout import Layout, Share, locate
from turboquant_jax.cache.state import Cache, Exact, LayerRows, Part
from turboquant_jax.quantizers.rotation import Identity


def paged_blocks(cache: Cache, rows: LayerRows) -> PagedBlocks:
    """The blocks of a layer: rows of one part, or of some parts, each head with its own."""
    pools = tuple(blocks_of(cache.parts[member.part]) for member in rows.members)
    table, lengths, kv_heads = cache.table.page_table, cache.lengths, cache.kv_heads
    if len(pools) == 1:
        return PagedBlocks(pools, table, lengths, rows.members[0].first, kv_heads)
    return PagedBlocks(pools, table, lengths, heads=rows.by_format())


def codecs_of(cache: Cache, rows: LayerRows, side: int) -> list[Codec]:
    """Those of the keys (0), or of the values (1), of each member of a layer."""
    return [cache.parts[member.part].codecs[side] for member in rows.members]


def rotation_of_values(cache: Cache, rows: LayerRows) -> RotationOperand | None:
    """None where the outputs of all heads are where they belong."""
    codecs = codecs_of(cache, rows, 1)
    groups = [group for codec in codecs for group in codec.groups]
    moved = any(codec.order is not None or codec.transform is not None for codec in codecs)
    if not moved and all(isinstance(group.rotation, Identity) for group in groups):
        return None
    return kernel_operands.of_layer(rows, codecs, cache.kv_heads)


def rotate_query(
    cache: Cache, rows: LayerRows, query: Float[Array, "B N H"]
) -> Float[Array, "B N H"]:
    """One query per sequence in the rotated space of the keys, float32."""
    codecs = codecs_of(cache, rows, 0)
    if not cache.config.key.coded:
        return query.astype(jnp.float32)
    if query.dtype != jnp.bfloat16:
        return rotate_by_member(rotate_queries, rows, codecs, query[:, None], cache.kv_heads)[:, 0]
    return rotate_in_kernel(query, kernel_operands.of_layer(rows, codecs, cache.kv_heads))


def sketch_of(part: Part, rotated: Float[Array, "B N H"]) -> Sketch | None:
    """What a sketch of the keys adds to their scores, for these queries in the rotated space."""
    if (held := part.pool.sketches) is None:
        return None
    return Sketch(part.codecs[0].sketch_query(rotated), held.signs, held.norms)


def exact_operand(
    cache: Cache, layer: Int[Array, ""], query, new: Exact, shared: int, **newest: Any
) -> ExactOperand:
    """Sinks, window and the newest tokens, without `shared` blocks; `newest`: of `ExactOperand`."""
    held = [part for part in (cache.sinks, cache.window) if part.keys.shape[2]]
    pending, places = cache.table.pending, partial(exact_places, cache.layout, shared=shared)
    if (share := cache.share) is not None:  # in one number, as the kernel takes no other
        pending = share.index + pending * share.count
        places = partial(places_on_share, share.count, replace(cache.layout, share=None))
    return ExactOperand(
        query=query,
        keys=(*(flat(part.keys) for part in held), new.keys),
        values=(*(flat(part.values) for part in held), new.values),
        pending=pending,
        places=partial(places, newest=new.keys.shape[1]),
        key_mean=None if cache.key_mean is None else flat(cache.key_mean),
        phases=None if cache.phases is None else kernel_operands.of_phases(cache.phases, share),
        layer=layer,
        **newest,
    )


def exact_places(
    layout: Layout, length: Any, pending: Any, newest: int = 1, shared: int = 0
) -> ExactPlaces:
    """Where the tokens of a sequence lie, as the kernel asks it: of the segments that there are.

    Without the first `shared` blocks, where no sliding window hides any.
    """
    place = locate(layout, length, pending)
    start, end = place.blocks
    if shared:
        start = jnp.int32(shared * layout.config.block)
    segments: list[tuple[Any, Any, Any]] = []
    if layout.sinks:
        segments.append((*place.sinks, place.sink_slot))
    if layout.ring:
        segments.append((*place.window, place.window_slot))
    return ExactPlaces((start, end), (*segments, (0, layout.counted(newest), 0)))


def places_on_share(
    shares: int, layout: Layout, length: Any, pending: Any, newest: int
) -> ExactPlaces:
    """`exact_places` on a share, whose number is in that of the pending tokens."""
    here = replace(layout, share=Share(pending % shares, shares))
    return exact_places(here, length, pending // shares, newest)


def written(cache: Cache, exact: ExactOperand) -> Cache:
    """The cache with the segments of `exact`, which hold the new token."""
    stored = zip(exact.keys[:-1], exact.values[:-1], strict=True)
    parts: dict[str, Any] = {}
    for name in ("sinks", "window"):
        old = getattr(cache, name)
        if old.keys.shape[2]:
            keys, values = next(stored)
            parts[name] = Exact(keys.reshape(old.keys.shape), values.reshape(old.values.shape))
    return replace(cache, **parts)


def blocks_of(part: Part) -> BlocksOperand:
    """Blocks of all rows, as the kernels read them; no codebooks of a side in full precision."""
    pool, sides = part.pool, []
    for codec in part.codecs:
        books = [kernel_operands.codebook_of(group) for group in codec.groups]
        served = tuple(book for book in books if book is not None)
        if len(served) < len(books):
            raise NotImplementedError("the kernel serves codebooks on its grid: codebook='grid'")
        sides.append(served)
    key, value = (codec.transform is not None for codec in part.codecs)
    joint = key, value
    return BlocksOperand(pool.keys, pool.values, pool.scales, sides[0], sides[1], joint, pool.bases)
