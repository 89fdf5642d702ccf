"""Attention of a chunk over itself and over the compressed past, by the vendor's kernel.

Three segments, joined by their log-sum-exp: the chunk, causally; sinks and window; and the
compressed blocks, a tile at a time, which is decoded to 16 bits in the rotated space, read once and
forgotten. So the past is never there in full precision, however long it is.

A tile is long and narrow: as few kv heads as give the device enough query rows, and many tokens. It
takes no more memory than a short one of all heads, and merging, which is a pass over the outputs so
far, is rare. Tiles that all sequences fill are attended to without a mask, which would cost the
vendor's kernel 8 % of its speed.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from turboquant_jax import fused, rotated
from turboquant_jax.cache import blocks, operands
from turboquant_jax.cache.codec import Codec
from turboquant_jax.cache.state import Cache
from turboquant_jax.segments import Part, Scores, merge, sink_part

# Tokens of a tile. Longer ones are merged less often; what no whole tile covers is masked.
TILE = 32768
# Query rows of one call: 128 for each of the 132 multiprocessors are enough.
ROWS = 16384
# Most groups of heads: each is compiled on its own.
GROUPS = 4
Vendor = Literal["cudnn", "xla"]


def unserved(cache: Cache, q: Float[Array, "B T N H"], scores: Scores) -> str | None:
    """Why this does not serve a call on this device, or None if it does."""
    if q.shape[1] == 1:
        return "one query token per sequence, served are more"
    if jax.default_backend() != "gpu":
        return f"the backend {jax.default_backend()!r}, served is 'gpu'"
    if jnp.dtype(cache.config.dtype).itemsize != 2:
        return f"a full precision of {cache.config.dtype}, served are 16 bits"
    # what cuDNN serves on every GPU that the kernels run on
    if cache.config.head_dim % 8 or cache.config.head_dim > 128:
        return f"a head dim of {cache.config.head_dim}, served are multiples of 8 up to 128"
    if scores.softcap is not None:
        return "a soft cap"
    if cache.config.sliding_window is not None:
        return "a sliding window"
    return None


def attend(
    cache: Cache,
    layer: Int[Array, ""],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    scores: Scores,
    sink_logits: Float[Array, " N"] | None,
    *,
    vendor: Vendor = "cudnn",
    tile: int = TILE,
    rows: int = ROWS,
) -> Float[Array, "B T N H"]:
    """What `attention.attend` says, with operands in the cache's 16 bits; no cap, no window."""
    config = cache.config
    scale = scores.factor(config.head_dim)
    queries, keys, values = (x.astype(config.dtype) for x in (q, k, v))
    sinks = [] if sink_logits is None else [sink_part(sink_logits, q.shape)]
    segment = partial(_segment, vendor, scale)

    def alone() -> list[Part]:
        return [segment(queries, keys, values, is_causal=True)]

    def with_past() -> list[Part]:
        parts = [*alone(), segment(queries, *_recent(cache, layer))]
        if cache.page_table.shape[1]:
            output, lse = _over_blocks(cache, layer, queries, segment, tile, rows)
            parts.append((output, lse + scale * _mean_products(cache, layer, queries)))
        return parts

    # each branch goes all the way to the output: what leaves a branch is copied
    return lax.cond(
        jnp.any(cache.lengths > 0),
        lambda: merge(with_past() + sinks)[0].astype(q.dtype),
        lambda: merge(alone() + sinks)[0].astype(q.dtype),
    )


def _segment(vendor: Vendor, scale: float, q, k, v, count=None, *, is_causal=False) -> Part:
    """All tokens, or of each sequence the first `count`, which may be none."""
    mask = None if count is None else jnp.maximum(count, 1)
    output, lse = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=is_causal,
        key_value_seq_lengths=mask,
        implementation=vendor,
        return_residual=True,
    )
    lse = lse.astype(jnp.float32)
    return output, lse if count is None else jnp.where((count > 0)[:, None, None], lse, -jnp.inf)


def _recent(cache: Cache, layer):
    """Keys and values [B, S, K, H] of sinks and window in order, and how many there are."""
    config, lengths, ring = cache.config, cache.lengths, cache.window.keys.shape[2]
    edge = config.sinks + config.compressed_tokens(lengths)
    slot = (edge[:, None] - config.sinks + jnp.arange(ring)[None, :]) % max(ring, 1)

    def in_order(sinks, window):
        index = slot[:, :, None, None]
        ordered = jnp.take_along_axis(window[layer], index, axis=1)
        return jnp.concatenate([sinks[layer], ordered], axis=1)

    keys, values = (
        in_order(getattr(cache.sinks, name), getattr(cache.window, name))
        for name in ("keys", "values")
    )
    sinks = jnp.minimum(lengths, cache.sinks.keys.shape[2])
    return keys, values, sinks + jnp.maximum(lengths - edge, 0)


def _over_blocks(cache: Cache, layer, queries, segment, tile: int, rows: int) -> Part:
    """The compressed blocks, tile by tile in the rotated space."""
    config, slots = cache.config, cache.page_table.shape[1]
    batch, count, heads, dim = queries.shape
    groups = _groups(config.num_kv_heads, batch * count * heads, rows)
    own = jnp.arange(config.num_kv_heads, dtype=jnp.int32).reshape(groups, -1)
    turned = _turn(cache.codecs[0], layer, queries, config.num_kv_heads)
    turned = turned.astype(queries.dtype).reshape(batch, count, groups, -1, dim)
    by_group = [turned[:, :, g] for g in range(groups)]  # once, not in every turn of the loops
    tokens = config.compressed_tokens(cache.lengths)
    pages = min(slots, max(1, tile // config.block))
    table = jnp.pad(jnp.maximum(cache.page_table, 0), ((0, 0), (0, pages)))
    decode = _decode if fused.unserved_blocks(cache) else fused.decode

    def attend_to(i, masked: bool) -> list[Part]:
        """Tile i, group by group."""
        page = lax.dynamic_slice_in_dim(table, i * pages, pages, axis=1)
        held = jnp.clip(tokens - i * pages * config.block, 0, pages * config.block)
        return [
            segment(q, *decode(cache, layer, page, g), held if masked else None)
            for q, g in zip(by_group, own, strict=True)
        ]

    def loop(first, last, masked: bool, parts: list[Part]) -> list[Part]:
        def step(i, parts: list[Part]) -> list[Part]:
            return [merge([*pair]) for pair in zip(parts, attend_to(i, masked), strict=True)]

        return lax.fori_loop(first, last, step, parts)

    full = jnp.min(tokens) // (pages * config.block)  # tiles that every sequence fills
    # first the one behind them: something to merge with, instead of zeros
    parts = [(output.astype(jnp.float32), lse) for output, lse in attend_to(full, masked=True)]
    parts = loop(0, full, False, parts)
    if batch > 1:  # sequences that are longer than the shortest
        parts = loop(full + 1, -(-jnp.max(tokens) // (pages * config.block)), True, parts)
    output, lse = (jnp.concatenate(x, axis=2) for x in zip(*parts, strict=True))
    return _turn_back(cache, layer, output), lse


def _groups(kv_heads: int, query_rows: int, rows: int) -> int:
    """How many groups of kv heads a tile can be split into, each with `rows` rows of queries."""
    most = min(GROUPS, query_rows // rows)
    return next(n for n in range(max(1, most), 0, -1) if kv_heads % n == 0)


def _mean_products(cache: Cache, layer, queries):
    """<q, mean key>, which centring took from every compressed key; 0 without centring."""
    if cache.key_mean is None:
        return jnp.zeros(queries.shape[:-1], jnp.float32)
    mean = jnp.repeat(cache.key_mean[layer], queries.shape[2] // cache.config.num_kv_heads, axis=1)
    # a sum, not a product of matrices, for which XLA would write the queries out in float32
    return jnp.sum(queries.astype(jnp.float32) * mean[:, None], axis=-1)


def _turn(
    codec: Codec, layer: Int[Array, ""], query: Float[Array, "B T N H"], kv_heads: int
) -> Float[Array, "B T N H"]:
    """Queries in the rotated space of the keys, float32; on the tensor cores from bfloat16."""
    if query.dtype != jnp.bfloat16:
        return rotated.rotate_queries(codec, layer, query, kv_heads)
    rotation = operands.of_codec(codec, layer)
    if rotation.signs is not None:
        query = query * rotation.signs.astype(query.dtype)[None, None, None, :]
    heads = rotation.parts.shape[1]
    grouped = query.reshape(*query.shape[:2], heads, -1, query.shape[3])
    turned = jnp.zeros(grouped.shape, jnp.float32)
    for part in rotation.parts:
        turned = turned + jnp.einsum(
            "btkgi,kji->btkgj", grouped, part, preferred_element_type=jnp.float32
        )
    return (turned * rotation.gain).reshape(query.shape)


def _turn_back(cache: Cache, layer, output: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """Outputs back from the rotated space, float32; on the tensor cores to bfloat16."""
    config, codec = cache.config, cache.codecs[1]
    if config.dtype != "bfloat16":
        return rotated.unrotate_outputs(codec, layer, output, config.num_kv_heads)
    rotation = operands.of_codec(codec, layer)
    heads = rotation.parts.shape[1]
    grouped = output.astype(jnp.bfloat16).reshape(*output.shape[:2], heads, -1, output.shape[3])
    turned = jnp.zeros(grouped.shape, jnp.float32)
    for part in rotation.parts:
        turned = turned + jnp.einsum(
            "kji,btkgj->btkgi", part, grouped, preferred_element_type=jnp.float32
        )
    turned = turned.reshape(output.shape) * rotation.gain
    return turned if rotation.signs is None else turned * rotation.signs[None, None, None, :]


def _decode(cache: Cache, layer, page: Int[Array, "B pages"], heads: Int[Array, " heads"]):
    """Keys and values [B, S, heads, H] of some pages and heads in the rotated space, in 16 bits."""
    place = layer, page[:, :, None], heads[None, None, :]
    found = jax.tree.map(lambda pool: pool[place], cache.pool)  # [B, pages, heads, ...]
    keys, values = blocks.unpack(cache.codecs, found)

    def by_token(vectors):  # [B, pages, heads, T, H] -> [B, S, heads, H]
        vectors = jnp.moveaxis(vectors.astype(cache.config.dtype), 2, 3)
        return vectors.reshape(page.shape[0], -1, *vectors.shape[3:])

    key_codec, value_codec = cache.codecs
    return by_token(key_codec.dequantize(keys)), by_token(value_codec.dequantize(values))
