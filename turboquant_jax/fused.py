"""The GPU kernel's view of a cache: one step of decoding over all of its segments.

Everything is passed as it lies in the cache, the pools of all layers as one; nothing is copied.
What depends on the lengths is computed inside the kernel: kernels beside it would take longer.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.decode import decode as decode_pages
from pallas_kernels.decode_attention import (
    Blocks,
    Codebook,
    PagedBlocks,
    Places,
    Recent,
    Softmax,
    decode_attention,
)
from pallas_kernels.rope import rope_and_rotate
from pallas_kernels.rope import rotate as rotate_in_kernel
from turboquant_jax import codebook as codebooks
from turboquant_jax import trellis
from turboquant_jax.cache import operands
from turboquant_jax.cache.codec import Codec
from turboquant_jax.cache.config import CacheConfig
from turboquant_jax.cache.operands import flat
from turboquant_jax.cache.state import Cache, Exact
from turboquant_jax.quantizer import Quantizer
from turboquant_jax.rotated import rotate_queries
from turboquant_jax.rotation import Identity


def unserved(cache: Cache, queries: int) -> str | None:
    """Why the kernel does not serve this call on this device, or None if it does."""
    if queries != 1:
        return f"{queries} query tokens per sequence, served is 1"
    if jnp.dtype(cache.config.dtype).itemsize not in (2, 4):
        return f"a full precision of {cache.config.dtype}, served are 16 and 32 bits"
    return unserved_blocks(cache)


def unserved_blocks(cache: Cache) -> str | None:
    """Why the kernels do not read the blocks of this cache on this device, or None if they do."""
    if not cache.page_table.shape[1]:
        return "a cache without blocks"
    if jax.default_backend() != "gpu":
        return f"the backend {jax.default_backend()!r}, served is 'gpu'"
    key, value = cache.codecs
    if len(key.groups) != len(value.groups) or any(
        k.dim != v.dim for k, v in zip(key.groups, value.groups, strict=False)
    ):
        return "keys and values with different groups of channels"
    for group in (*key.groups, *value.groups):
        if _integers(group) is None:
            return "a codebook off the kernel's grid; use codebook='grid' or 'uniform'"
    return None


def attend(
    cache: Cache,
    layer: Int[Array, ""],
    query: Float[Array, "B N H"],
    new: tuple[Float[Array, "B 1 K H"], Float[Array, "B 1 K H"]],
    *,
    scale: float,
    softcap: float | None,
    sink_logits: Float[Array, " N"] | None,
    write: bool,
    rotated: Float[Array, "B N H"] | None = None,
) -> tuple[Float[Array, "B N H"], Cache]:
    """Attention of one query per sequence over a layer and over the new token's key and value.

    The output has the dtype of the query. `write` also writes the token where it is pending.
    `rotated`: the query in the rotated space of the keys, where `turn` has made it already.
    """
    key_codec, value_codec = cache.codecs
    turned_values = all(
        value_codec.order is not None or not isinstance(group.rotation, Identity)
        for group in value_codec.groups
    )
    if rotated is None:
        rotated = _rotate_one(key_codec, layer, query, cache.config.num_kv_heads)
    output, _, recent = decode_attention(
        rotated,
        PagedBlocks(
            groups_of(cache), cache.page_table, cache.lengths, layer, cache.config.num_layers
        ),
        Softmax(scale, softcap, sink_logits),
        recent=_recent(cache, query, new, write),
        rotation=operands.of_codec(value_codec, layer) if turned_values else None,
        dtype=query.dtype,
    )
    return output, cache if recent is None or not write else _written(cache, recent)


def turn(
    cache: Cache,
    layer: Int[Array, ""],
    qkv: Float[Array, "B K G+2 H"],
    cos: Float[Array, "B H/2"],
    sin: Float[Array, "B H/2"],
) -> tuple[
    Float[Array, "B N H"], Float[Array, "B K H"], Float[Array, "B K H"], Float[Array, "B N H"]
]:
    """RoPE of one token per sequence, in bfloat16: query, key, value and `attend`'s `rotated`."""
    operand = operands.of_codec(cache.codecs[0], layer)
    return rope_and_rotate(qkv, cos, sin, operand)


def _rotate_one(
    codec: Codec, layer: Int[Array, ""], query: Float[Array, "B N H"], kv_heads: int
) -> Float[Array, "B N H"]:
    """One query per sequence in the rotated space of the keys, float32."""
    if query.dtype != jnp.bfloat16:
        return rotate_queries(codec, layer, query[:, None], kv_heads)[:, 0]
    return rotate_in_kernel(query, operands.of_codec(codec, layer))


def _recent(cache: Cache, query, new, write: bool) -> Recent:
    config = cache.config
    held = [part for part in (cache.sinks, cache.window) if part.keys.shape[2]]
    return Recent(
        query=query,
        keys=(*(flat(part.keys) for part in held), new[0]),
        values=(*(flat(part.values) for part in held), new[1]),
        pending=cache.pending,
        places=partial(_places, config, cache.sinks.keys.shape[2], cache.window.keys.shape[2]),
        key_mean=None if cache.key_mean is None else flat(cache.key_mean),
        write=write,
    )


def _places(config: CacheConfig, sinks: int, ring: int, length: Any, pending: Any) -> Places:
    """Where the tokens of a sequence lie; `sinks` and `ring` are the slots of the segments."""
    end, oldest = config.compressed_tokens(length), jnp.int32(0)
    start: Any = 0
    if config.sliding_window is not None:
        oldest = jnp.maximum(length + 1 - config.sliding_window, 0)
        start = jnp.maximum(oldest - config.sinks, 0)
    segments: list[tuple[Any, Any, Any]] = []
    if sinks:
        slot = jnp.where(pending > 0, length, -1)  # past the sinks: nowhere
        segments.append((oldest, jnp.minimum(length, sinks) - oldest, slot))
    if ring:
        edge = jnp.maximum(config.sinks + end, oldest)
        newest = length - config.sinks
        slot = jnp.where((pending > 0) & (newest >= 0), newest % ring, -1)
        segments.append(((edge - config.sinks) % ring, length - edge, slot))
    segments.append((0, 1, 0))
    return Places((start, end), tuple(segments))


def _written(cache: Cache, recent: Recent) -> Cache:
    """The cache with the segments of `recent`, which hold the new token."""
    stored = zip(recent.keys[:-1], recent.values[:-1], strict=True)
    parts: dict[str, Any] = {}
    for name in ("sinks", "window"):
        old = getattr(cache, name)
        if old.keys.shape[2]:
            keys, values = next(stored)
            parts[name] = Exact(keys.reshape(old.keys.shape), values.reshape(old.values.shape))
    return replace(cache, **parts)


def decode(
    cache: Cache,
    layer: Int[Array, ""],
    pages: Int[Array, "B pages"],
    heads: Int[Array, " heads"],
) -> tuple[Float[Array, "B S heads H"], Float[Array, "B S heads H"]]:
    """Keys and values of some pages and heads of a layer in the rotated space, in its dtype."""
    page = pages.ravel() + layer * cache.references.shape[0]
    dtype = cache.config.dtype
    found = decode_pages(groups_of(cache), page, heads, dtype=dtype)
    shape = (pages.shape[0], -1, *found[0].shape[2:])
    return found[0].reshape(shape), found[1].reshape(shape)


def groups_of(cache: Cache) -> tuple[Blocks, ...]:
    """The pools of all layers, one after another, as the kernels read them."""
    return tuple(
        Blocks(
            jax.tree.map(flat, keys),
            jax.tree.map(flat, values),
            flat(scales),
            _table(key),
            _table(value),
        )
        for keys, values, scales, key, value in zip(
            cache.pool.keys, cache.pool.values, cache.pool.scales,
            *(codec.groups for codec in cache.codecs), strict=True,
        )
    )  # fmt: skip


def _table(group: Quantizer) -> Codebook:
    integers = _integers(group)
    if integers is None:
        raise NotImplementedError("the kernel serves codebooks on its grid: codebook='grid'")
    levels, step = integers
    return Codebook(group.bits, levels, step, group.code)


def _integers(group: Quantizer) -> tuple[tuple[int, ...], float] | None:
    limit = trellis.grid_limit(group.bits) if group.code == "trellis" else None
    return codebooks.grid_integers(group.levels, limit)
