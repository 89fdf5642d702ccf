"""Attention of a chunk over the past of a model with a sliding window, by the vendor's kernel.

The past that a window W leaves is short: W - 1 tokens for the first query, one less for each that
follows, none from the W-th on. So it is decoded in one piece, turned back to the natural space with
the mean of its keys, and sinks, blocks and window become one row of tokens, the newest first.

In that order what a sequence holds comes first, however long it is, and a length masks the rest.
Token i is seen by query t where i <= W - 2 - t. With the R = min(T, W - 1) queries that see any of
it, the newest W - 1 - R tokens are seen by all; of the R others one more is seen by each query
than by the one that follows: with the queries in reverse that is the causal mask. No mask of
queries times tokens is needed.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from turboquant_jax.attention import head_rotation, kernel_call, not_finite, tensor_cores
from turboquant_jax.attention.segments import SegmentPart
from turboquant_jax.cache import pre_rope
from turboquant_jax.cache.state import Cache, LayerRows
from turboquant_jax.quantizers.direction import nan_unless_finite


def attend(
    cache: Cache,
    rows: LayerRows,
    queries: Float[Array, "B T N H"],
    window: int,
    segment: Callable[..., SegmentPart],
    decode: Callable[..., tuple[Array, Array]],
) -> tuple[list[SegmentPart], Float[Array, "B S K"], Bool[Array, "B S K H"]]:
    """The past in parts that are disjoint; its reach and its values that are not finite, of the

    S = `window` - 1 tokens before the chunk, the newest first.

    `segment` is the vendor's attention over some tokens, `decode` gives pages in the rotated space.
    """
    total = queries.shape[1]
    count = min(total, window - 1)
    near = window - 1 - count
    keys, values, held = _newest_first(cache, rows, window - 1, decode)
    keys, values, reach, bad = not_finite.clean(keys, values)
    first, parts = queries[:, :count], []
    if near:
        parts.append(segment(first, keys[:, :near], values[:, :near], jnp.minimum(held, near)))
    if count:
        rest = jnp.clip(held - near, 0, count)
        found = segment(first[:, ::-1], keys[:, near:], values[:, near:], rest, is_causal=True)
        parts.append((found[0][:, ::-1], found[1][:, ::-1]))

    def of_all(output, lse):  # the other queries see nothing
        behind = [(0, 0), (0, total - count), (0, 0)]
        return jnp.pad(output, [*behind, (0, 0)]), jnp.pad(lse, behind, constant_values=-jnp.inf)

    return [of_all(*part) for part in parts], reach, bad


def _newest_first(cache: Cache, rows: LayerRows, count: int, decode):
    """Keys and values [B, S, K, H] of the S = `count` tokens before the chunk, the newest first,

    0 where there is none; how many there are [B].
    """
    position = cache.lengths[:, None] - 1 - jnp.arange(count)[None, :]
    seen = (position >= 0)[..., None, None]
    slot = cache.layout.slot(cache.lengths[:, None], position)
    slot = jnp.where(position >= 0, slot, 0)[..., None, None]
    blocks = _blocks(cache, rows, decode) if cache.layout.slots else None

    def in_order(name: str, side: int):
        held = [getattr(part, name)[rows.layer] for part in (cache.sinks, cache.window)]
        held += [] if blocks is None else [blocks[side]]
        found = jnp.take_along_axis(jnp.concatenate(held, axis=1), slot, axis=1)
        return jnp.where(seen, found, 0)

    return in_order("keys", 0), in_order("values", 1), jnp.minimum(cache.lengths, count)


def _blocks(cache: Cache, rows: LayerRows, decode):
    """Keys and values [B, S, K, H] of every block in the page table, as they were before coding."""
    config, heads = cache.config, np.arange(cache.kv_heads, dtype=np.int32)
    found = decode(jnp.maximum(cache.table.page_table, 0), heads)
    unrotate = partial(tensor_cores.unrotate, dtype=config.dtype)
    # of coded vectors the whole is NaN, or nothing of it is
    spread = (nan_unless_finite, nan_unless_finite if config.value.coded else jnp.asarray)
    keys, values = (
        head_rotation.rotate_by_member(
            unrotate, rows, kernel_call.codecs_of(cache, rows, side), spread[side](x), len(heads)
        )
        for side, x in enumerate(found)
    )
    if cache.key_mean is not None:
        position, _ = cache.layout.block_positions(cache.lengths[:, None])
        keys = keys + jax.vmap(lambda mean, index: pre_rope.mean_at(mean, cache.phases, index))(
            cache.key_mean[rows.layer], position - config.sinks
        )
    return keys.astype(config.dtype), spread[1](values).astype(config.dtype)
