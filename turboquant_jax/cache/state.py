"""The compressed cache: an immutable pytree, and how an empty one is made.

Three segments hold a sequence (`config.CacheConfig` says which token lies where): sinks and recent
window in full precision, and whole blocks of compressed tokens in a pool of pages. A page holds the
block of every layer, so that one page table serves all layers; a dense cache is one whose table is
the identity. `blocks` has the layout of a page, `appending` the way in.
"""

from dataclasses import dataclass, field
from math import ceil
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass
from jaxtyping import Array, Bool, Float, Int

from turboquant_jax.cache import blocks, codec, pages
from turboquant_jax.cache.blocks import Blocks
from turboquant_jax.cache.codec import Codec
from turboquant_jax.cache.config import CacheConfig


@register_dataclass
@dataclass(frozen=True)
class Exact:
    """Tokens in full precision: keys (after RoPE) and values, not rotated."""

    keys: Float[Array, "layers B slots K H"]
    values: Float[Array, "layers B slots K H"]


@register_dataclass
@dataclass(frozen=True, repr=False)
class Cache:
    """The cache of all layers for B sequences. Immutable: every function returns a new one.

    Attributes:
      config: everything static.
      capacity: most tokens a sequence may have.
      codecs: of the keys and of the values.
      lengths: int32 [B], tokens of each sequence.
      pending: int32 [B], tokens being appended between `begin` and `commit`.
      overflow: bool [B]; True once an append did not fit. **Look at it**: that append, and every
        later one until the sequence is freed, left the sequence as it was.
      page_table: int32 [B, slots]; block j of a sequence has its page in slot j mod slots.
      pending_pages: int32 [B, slots], pages of the blocks that the pending tokens complete. They
        enter the table at `commit`: until then queries still see what the table says.
      references: int32 [pages], how many table entries refer to each page; 0 = free.
      sinks, window: the full-precision segments; token p lies in window slot (p - sinks) mod slots.
      pool: the packed blocks [layers, pages, ...].
      key_mean: float32 [layers, B, K, H], or None without key centring.
    """

    config: CacheConfig = field(metadata={"static": True})
    capacity: int = field(metadata={"static": True})
    codecs: tuple[Codec, Codec]
    lengths: Int[Array, " B"]
    pending: Int[Array, " B"]
    overflow: Bool[Array, " B"]
    page_table: Int[Array, "B slots"]
    pending_pages: Int[Array, "B slots"]
    references: Int[Array, " pages"]
    sinks: Exact
    window: Exact
    pool: Blocks
    key_mean: Float[Array, "layers B K H"] | None

    @property
    def nbytes(self) -> int:
        """Bytes of every array of the pytree."""
        return nbytes_of(self)

    def __repr__(self) -> str:
        c = self.config
        parts = [
            f"layers={c.num_layers}, capacity={self.capacity}, kv_heads={c.num_kv_heads}, "
            f"head_dim={c.head_dim}, key={c.key.bits} bits, value={c.value.bits} bits, "
            f"block={c.block}, window={c.window}, sinks={c.sinks}"
        ]
        # JAX also fills this pytree with shardings, axes or nothing at all, and prints it in errors
        if all(hasattr(leaf, "shape") and leaf.shape for leaf in (self.lengths, self.references)):
            parts.append(f"batch={self.lengths.shape[-1]}, pages={self.references.shape[-1]}")
        if all(hasattr(leaf, "size") for leaf in jax.tree.leaves(self)):
            parts.append(f"nbytes={self.nbytes:,}")
        return f"Cache({', '.join(parts)})"


def nbytes_of(tree: Any) -> int:
    """Bytes of every array of a pytree, or of the shapes of one."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def create(
    config: CacheConfig,
    batch: int,
    capacity: int,
    *,
    key: Array,
    num_pages: int | None = None,
    key_order: Int[Array, "layers K H"] | None = None,
    value_order: Int[Array, "layers K H"] | None = None,
) -> Cache:
    """An empty cache.

    Args:
      config: its static description.
      batch: sequences B.
      capacity: most tokens of one sequence; pages for the whole capacity of every sequence are
        there, and in its table, unless `num_pages` is given.
      key: random key of the rotations, shared by all layers and heads.
      num_pages: pages of a pool that the sequences share, given out when blocks are compressed.
      key_order, value_order: channels of each layer and head in the order of the codec's groups,
        outliers first (`outliers.select_channels`).

    Raises:
      ValueError: a batch, capacity, number of pages or codec that cannot be.
    """
    slots = block_slots(config, capacity)
    dense = num_pages is None
    num_pages = batch * slots if num_pages is None else num_pages
    if batch < 1 or capacity < 1 or num_pages < min(slots, 1):
        raise ValueError(
            "batch, capacity and num_pages must be positive, "
            f"got {batch}, {capacity} and {num_pages}"
        )
    for order in (key_order, value_order):
        expected = (config.num_layers, config.num_kv_heads, config.head_dim)
        if order is not None and order.shape != expected:
            raise ValueError(f"an order of channels must be {expected}, got {order.shape}")
    key_key, value_key = jax.random.split(key)
    codecs = (
        codec.create(key_key, config.key, config.head_dim, key_order),
        codec.create(value_key, config.value, config.head_dim, value_order),
    )
    nothing = jnp.full((batch, slots), pages.UNASSIGNED, jnp.int32)
    identity = jnp.arange(batch * slots, dtype=jnp.int32).reshape(batch, slots)
    heads, dim = config.num_kv_heads, config.head_dim

    def exact(count: int) -> Exact:
        shape = (config.num_layers, batch, count, heads, dim)
        return Exact(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))

    return Cache(
        config=config,
        capacity=capacity,
        codecs=codecs,
        lengths=jnp.zeros(batch, jnp.int32),
        pending=jnp.zeros(batch, jnp.int32),
        overflow=jnp.zeros(batch, bool),
        page_table=identity if dense else jnp.copy(nothing),
        pending_pages=nothing,
        references=jnp.full(num_pages, int(dense), jnp.int32),
        sinks=exact(min(config.sinks, capacity)),
        window=exact(max(0, min(config.window + config.block, capacity - config.sinks))),
        pool=blocks.empty(codecs, (config.num_layers, num_pages), heads, config.block),
        key_mean=jnp.zeros((config.num_layers, batch, heads, dim)) if config.center_keys else None,
    )


def block_slots(config: CacheConfig, capacity: int) -> int:
    """Most blocks that a sequence holds at a time.

    With local attention the blocks are a ring. Of the W = `sliding_window` tokens that the next
    query sees, itself included, the newest `window` before it at least are not compressed, and the
    blocks end where those begin: ceil((W - 1 - window) / block) of them cover the rest.
    """
    slots = config.num_blocks(capacity)
    if config.sliding_window is None:
        return slots
    return min(slots, max(0, ceil((config.sliding_window - 1 - config.window) / config.block)))
