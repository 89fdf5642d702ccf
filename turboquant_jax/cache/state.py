"""The compressed cache: an immutable pytree, and how an empty one is made.

Three segments hold a sequence (`layout` says which token lies where): sinks and recent window in
full precision, of all layers and heads alike, and whole blocks of compressed tokens in pages. The
heads of one format are a *part*, whose rows are (layer, kv head) pairs in their order. A page holds
the block of every row of every part, so that one page table serves them all; a dense cache is one
whose table is the identity. `blocks` has the layout of a page, `updating` the way in.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass
from jaxtyping import Array, Bool, Float, Int

from turboquant_jax.cache import blocks, codec, pages, pre_rope
from turboquant_jax.cache import calibration as calibrations
from turboquant_jax.cache.blocks import Blocks
from turboquant_jax.cache.calibration import Calibration
from turboquant_jax.cache.codec import Codec
from turboquant_jax.cache.config import CacheConfig, Format
from turboquant_jax.cache.layout import Layout, Share, block_slots
from turboquant_jax.cache.pre_rope import Phases


@register_dataclass
@dataclass(frozen=True)
class Exact:
    """Tokens in full precision: keys (after RoPE) and values, not rotated."""

    keys: Float[Array, "*lead slots K H"]
    values: Float[Array, "*lead slots K H"]


@register_dataclass
@dataclass(frozen=True)
class Table:
    """How long the sequences are, and which pages they have.

    Attributes:
      lengths: int32 [B], tokens of each sequence.
      pending: int32 [B], tokens being appended between `begin` and `commit`.
      overflow: bool [B]; True once an append did not fit. **Look at it**: that append, and every
        later one until the sequence is freed, left the sequence as it was.
      page_table: int32 [B, slots]; block j of a sequence has its page in slot j mod slots.
      pending_pages: int32 [B, slots], pages of the blocks that the pending tokens complete. They
        enter the table at `commit`: until then queries still see what the table says.
      references: int32 [pages], how many table entries refer to each page; 0 = free.
    """

    lengths: Int[Array, " B"]
    pending: Int[Array, " B"]
    overflow: Bool[Array, " B"]
    page_table: Int[Array, "B slots"]
    pending_pages: Int[Array, "B slots"]
    references: Int[Array, " pages"]


@register_dataclass
@dataclass(frozen=True)
class Part:
    """The heads of one format: the codecs of keys and values, and the blocks [rows, pages, ...]."""

    codecs: tuple[Codec, Codec]
    pool: Blocks


@register_dataclass
@dataclass(frozen=True, repr=False)
class Cache:
    """The cache of all layers for B sequences. Immutable: every function returns a new one.

    Attributes:
      config: everything static.
      capacity: most tokens a sequence may have.
      tables: one for each kind of window that the layers have; today there is one kind.
      sinks, window: the full-precision segments.
      key_mean: float32 [layers, B, K, H], or None without key centring.
      phases: the angles that turn the mean to its places, or None where it is that of stored keys.
      parts: the compressed blocks, by format.
      scratch: pending tokens between `propose` and `commit`, which may take them back; else None.
      share: which blocks of the sequences are here, inside `mesh.on_shards`; None for all.
    """

    config: CacheConfig = field(metadata={"static": True})
    capacity: int = field(metadata={"static": True})
    tables: tuple[Table, ...]
    sinks: Exact
    window: Exact
    key_mean: Float[Array, "layers B K H"] | None
    phases: Phases | None
    parts: tuple[Part, ...]
    scratch: Exact | None = None
    share: Share | None = None

    @property
    def table(self) -> Table:
        """The one table."""
        (table,) = self.tables
        return table

    @property
    def lengths(self) -> Int[Array, " B"]:
        """Tokens of each sequence."""
        return self.table.lengths

    @property
    def overflow(self) -> Bool[Array, " B"]:
        """Which sequences an append did not fit: see `Table`."""
        return self.table.overflow

    @property
    def kv_heads(self) -> int:
        """K, of the arrays: those of a shard are fewer than the model's."""
        return self.sinks.keys.shape[3]

    @property
    def num_layers(self) -> int:
        """Layers."""
        return self.sinks.keys.shape[0]

    @property
    def layout(self) -> Layout:
        """The rule of place for the sizes of this cache."""
        sinks, ring = (segment.keys.shape[2] for segment in (self.sinks, self.window))
        return Layout(self.config, sinks, ring, self.table.page_table.shape[1], self.share)

    @property
    def nbytes(self) -> int:
        """Bytes of every array of the pytree."""
        return nbytes_of(self)

    def with_table(self, **changes: Any) -> "Cache":
        """The cache with other arrays in its table."""
        return replace(self, tables=(replace(self.table, **changes),))

    def with_lengths(self, lengths: Int[Array, " B"]) -> "Cache":
        """As if every sequence had so many tokens: whatever lies in their places counts."""
        return self.with_table(lengths=lengths)

    def __repr__(self) -> str:
        c = self.config
        keys, values = (
            ", ".join(str(getattr(form, name).bits) for form in c.formats)
            for name in ("key", "value")
        )
        parts = [
            f"layers={c.num_layers}, capacity={self.capacity}, kv_heads={c.num_kv_heads}, "
            f"head_dim={c.head_dim}, key={keys} bits, value={values} bits, "
            f"block={c.block}, window={c.window}, sinks={c.sinks}"
        ]
        # JAX also fills this pytree with shardings, axes or nothing at all, and prints it in errors
        leaves = jax.tree.leaves(self)
        if leaves and all(hasattr(leaf, "size") for leaf in leaves):
            batch, pages = self.lengths.shape[-1], self.table.references.shape[-1]
            parts.append(f"batch={batch}, pages={pages}, nbytes={self.nbytes:,}")
        return f"Cache({', '.join(parts)})"


@register_dataclass
@dataclass(frozen=True)
class Rows:
    """The rows of a part that heads of one layer have: they follow each other, from `first` on.

    Attributes:
      part: number of the part.
      heads: kv heads of the layer, or None for all of them.
      first: row of the first of them.
    """

    part: int = field(metadata={"static": True})
    heads: tuple[int, ...] | None = field(metadata={"static": True})
    first: Int[Array, ""]

    def of(self, kv_heads: int) -> Int[Array, " heads"]:
        """Every row, in a layer of so many kv heads."""
        count = kv_heads if self.heads is None else len(self.heads)
        return self.first + jnp.arange(count, dtype=jnp.int32)

    def pick(self, x: Array, axis: int) -> Array:
        """The heads of an array whose axis is those of the layer."""
        if self.heads is None:
            return x
        return jnp.take(x, np.asarray(self.heads), axis=axis)


@register_dataclass
@dataclass(frozen=True)
class LayerRows:
    """Where a layer lies in a cache.

    Layers whose heads have the same formats differ in arrays alone, so that what is compiled for
    one serves the others.

    Attributes:
      layer: its number, in the segments in full precision.
      members: its rows, one entry for each format of its heads.
    """

    layer: Int[Array, ""]
    members: tuple[Rows, ...]

    def only(self, heads: Int[np.ndarray, " heads"]) -> "LayerRows":
        """Heads that follow each other, as if there were no others."""
        start, stop, members = int(heads[0]), int(heads[-1]) + 1, []
        for member in self.members:
            if member.heads is None:
                members.append(replace(member, first=member.first + start))
                continue
            own = tuple(head - start for head in member.heads if start <= head < stop)
            before = sum(head < start for head in member.heads)
            if own:
                whole = None if len(own) == stop - start else own
                members.append(Rows(member.part, whole, member.first + before))
        return LayerRows(self.layer, tuple(members))

    def by_format(self) -> Int[Array, "K 3"]:
        """(number of the member, row, head) of several members' heads, member after member."""
        own = []
        for number, member in enumerate(self.members):
            heads = jnp.asarray(member.heads or (), jnp.int32)
            rows = member.of(len(heads))
            own.append(jnp.stack([jnp.full_like(rows, number), rows, heads], axis=1))
        return jnp.concatenate(own)

    def join(self, arrays: Sequence[Array], axis: int) -> Array:
        """All heads in their order, of the arrays that `Rows.pick` would give for each member."""
        if len(arrays) == 1:
            return arrays[0]
        return jnp.take(jnp.concatenate(arrays, axis=axis), self.order, axis=axis)

    @property
    def order(self) -> Int[np.ndarray, " K"]:
        """Where each head of the layer is among those of `by_format`."""
        return np.argsort([head for member in self.members for head in member.heads or ()])


def rows_of(cache: Cache, layer: int | Int[Array, ""]) -> LayerRows:
    """The rows of a layer; it may be traced where all layers have one format.

    Raises:
      ValueError: no such layer, or one that is not known while tracing.
    """
    places, heads = cache.config.places, cache.kv_heads
    if len(cache.parts) == 1:
        layer = jnp.asarray(layer, jnp.int32)
        return LayerRows(layer, (Rows(0, None, layer * heads),))
    try:
        number = operator.index(layer)
    except TypeError as error:
        raise ValueError(
            f"layer: got {layer}, expected one that is known while tracing: layers that differ "
            "cannot be scanned, unstack the decoder"
        ) from error
    if not 0 <= number < len(places):
        raise ValueError(f"layer: got {number}, expected 0 to {len(places) - 1}")
    own, members = places[number], []
    for part in dict.fromkeys(own):
        first = sum(heads if p == (part,) else p.count(part) for p in places[:number])
        which = None if len(own) == 1 else tuple(h for h, p in enumerate(own) if p == part)
        members.append(Rows(part, which, jnp.int32(first)))
    return LayerRows(jnp.int32(number), tuple(members))


def heads_of(config: CacheConfig, part: int, kv_heads: int) -> tuple[tuple[int, int], ...]:
    """(layer, kv head) of every row of a part."""
    return tuple(
        (layer, head)
        for layer, own in enumerate(config.places)
        for head, p in enumerate(own * kv_heads if len(own) == 1 else own)
        if p == part
    )


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
    calibration: Calibration | None = None,
) -> Cache:
    """An empty cache.

    Args:
      config: its static description.
      batch: sequences B.
      capacity: most tokens of one sequence; pages for the whole capacity of every sequence are
        there, and in its table, unless `num_pages` is given.
      key: random key of the rotations, shared by all layers and heads.
      num_pages: pages of a pool that the sequences share, given out when blocks are compressed.
      key_order: channels of the keys of each layer and head in the order of the codec's groups,
        outliers first (`outliers.select_channels`).
      value_order: the same of the values.
      calibration: of the model, for codecs with joint scales.

    Raises:
      ValueError: a batch, capacity, number of pages, codec or calibration that cannot be.
    """
    slots = block_slots(config, capacity)
    dense = num_pages is None
    num_pages = batch * slots if num_pages is None else num_pages
    if batch < 1 or capacity < 1 or num_pages < min(slots, 1):
        raise ValueError(
            f"batch, capacity and num_pages: got {batch}, {capacity} and {num_pages}, "
            "expected positive ones"
        )
    heads, dim = config.num_kv_heads, config.head_dim
    for order in (key_order, value_order):
        expected = (config.num_layers, heads, dim)
        if order is not None and order.shape != expected:
            raise ValueError(f"order of channels: got {order.shape}, expected {expected}")
    bases = calibrations.bases(config, calibration)

    def part(number: int, form: Format) -> Part:
        rows = heads_of(config, number, heads)
        layer, head = np.transpose(rows)
        sides = zip(
            jax.random.split(key),
            (form.key, form.value),
            (key_order, value_order),
            bases,
            strict=True,
        )
        key_codec, value_codec = (
            codec.create(
                own, codecs, dim, *jax.tree.map(lambda x: jnp.asarray(x)[layer, head], of_heads)
            )
            if codecs.coded
            else codec.uncoded(dim, config.dtype)
            for own, codecs, *of_heads in sides
        )
        codecs = key_codec, value_codec
        return Part(
            codecs, blocks.empty(codecs, (len(rows), num_pages), config.block, config.scale_bits)
        )

    def exact(count: int) -> Exact:
        shape = (config.num_layers, batch, count, heads, dim)
        return Exact(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))

    return Cache(
        config=config,
        capacity=capacity,
        tables=(empty_table(batch, slots, num_pages, dense),),
        sinks=exact(min(config.sinks, capacity)),
        window=exact(max(0, min(config.window + config.block, capacity - config.sinks))),
        key_mean=jnp.zeros((config.num_layers, batch, heads, dim)) if config.centred else None,
        phases=pre_rope.create(config, capacity),
        parts=tuple(part(number, form) for number, form in enumerate(config.formats)),
    )


def empty_table(batch: int, slots: int, num_pages: int, dense: bool) -> Table:
    """Of sequences without tokens; dense: each has the pages of all its blocks already."""
    nothing = jnp.full((batch, slots), pages.UNASSIGNED, jnp.int32)
    identity = jnp.arange(batch * slots, dtype=jnp.int32).reshape(batch, slots)
    return Table(
        lengths=jnp.zeros(batch, jnp.int32),
        pending=jnp.zeros(batch, jnp.int32),
        overflow=jnp.zeros(batch, bool),
        page_table=identity if dense else jnp.copy(nothing),
        pending_pages=nothing,
        references=jnp.full(num_pages, int(dense), jnp.int32),
    )
