"""Attention of a chunk over itself and over the compressed past, by the vendor's kernel.

Three segments, joined by their log-sum-exp: the chunk, causally; sinks and window; and the
compressed blocks, a tile of `TILE` tokens at a time, which is decoded to 16 bits in the rotated
space, read once and forgotten. So the past is never there in full precision, however long it is.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from turboquant_jax import fused, rotated
from turboquant_jax.cache import blocks
from turboquant_jax.cache.state import Cache
from turboquant_jax.segments import Part, Scores, merge, sink_part

# Tokens of the past that are decoded at a time: enough queries share them to pay for the decoding,
# and merging with what came before, which costs a pass over the output, is rare.
TILE = 16384
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
) -> Float[Array, "B T N H"]:
    """What `attention.attend` says, with operands in the cache's 16 bits; no cap, no window."""
    config = cache.config
    scale = scores.factor(config.head_dim)
    queries, keys, values = (x.astype(config.dtype) for x in (q, k, v))

    def segment(q, k, v, **mask) -> Part:
        output, lse = jax.nn.dot_product_attention(
            q, k, v, scale=scale, implementation=vendor, return_residual=True, **mask
        )
        return output, lse.astype(jnp.float32)

    def over(q, k, v, count: Int[Array, " B"]) -> Part:
        """The first `count` tokens, which may be none."""
        output, lse = segment(q, k, v, key_value_seq_lengths=jnp.maximum(count, 1))
        return output, jnp.where((count > 0)[:, None, None], lse, -jnp.inf)

    chunk = segment(queries, keys, values, is_causal=True)

    def with_past() -> Part:
        recent = over(queries, *_recent(cache, layer))
        if not cache.page_table.shape[1]:
            return merge([chunk, recent])
        turned = fused.rotate(cache.codecs[0], layer, queries, config.num_kv_heads)
        past = _over_blocks(cache, layer, turned.astype(config.dtype), over, tile)
        product = rotated.mean_products(cache, layer, queries)
        if product is not None:
            past = past[0], past[1] + scale * product
        back = rotated.unrotate_outputs(cache.codecs[1], layer, past[0], config.num_kv_heads)
        return merge([chunk, recent, (back, past[1])])

    output, lse = lax.cond(
        jnp.any(cache.lengths > 0), with_past, lambda: (chunk[0].astype(jnp.float32), chunk[1])
    )
    if sink_logits is not None:
        output, _ = merge([(output, lse), sink_part(sink_logits, q.shape)])
    return output.astype(q.dtype)


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


def _over_blocks(cache: Cache, layer, turned, over, tile: int) -> Part:
    """The compressed blocks in the rotated space, tile by tile."""
    config, slots = cache.config, cache.page_table.shape[1]
    decode = _decode if fused.unserved_blocks(cache) else fused.decode
    pages = min(slots, max(1, tile // config.block))
    tokens = config.compressed_tokens(cache.lengths)
    table = jnp.pad(jnp.maximum(cache.page_table, 0), ((0, 0), (0, -slots % pages)))

    def step(i, part: Part) -> Part:
        page = lax.dynamic_slice_in_dim(table, i * pages, pages, axis=1)
        keys, values = decode(cache, layer, page)
        count = jnp.clip(tokens - i * pages * config.block, 0, pages * config.block)
        return merge([part, over(turned, keys, values, count)])

    nothing = jnp.zeros(turned.shape, jnp.float32), jnp.full(turned.shape[:3], -jnp.inf)
    tiles = -(-jnp.max(tokens) // (pages * config.block))
    return lax.fori_loop(0, tiles, step, nothing)


def _decode(cache: Cache, layer, page: Int[Array, "B pages"]):
    """Keys and values [B, S, K, H] of some pages in the rotated space, in the cache's dtype."""
    found = jax.tree.map(lambda pool: pool[layer, page], cache.pool)  # [B, pages, K, ...]
    keys, values = blocks.unpack(cache.codecs, found)

    def by_token(vectors):  # [B, pages, K, T, H] -> [B, S, K, H]
        vectors = jnp.moveaxis(vectors.astype(cache.config.dtype), 2, 3)
        return vectors.reshape(page.shape[0], -1, *vectors.shape[3:])

    key_codec, value_codec = cache.codecs
    return by_token(key_codec.dequantize(keys)), by_token(value_codec.dequantize(values))
