"""Where the tokens of a sequence lie: the only rule of it.

    position   0 .. sinks-1     sinks .. edge-1      edge .. length-1     length .. length+pending-1
    segment    sinks            compressed blocks    window, a ring       on their way in

with `edge = sinks + C(length)`. Block j has the positions from sinks + j * block on and lies in
slot j modulo `slots` of the page table; position p lies in slot (p - sinks) modulo `ring` of the
window. All of it is int32 arithmetic on scalars or arrays: it runs inside a kernel and under `vmap`
alike.

Where several devices share the blocks of a sequence (`mesh`), stripes of `STRIPE` tokens are
dealt to them in turn. A share numbers its own blocks from 0 on, and they lie in its page table as
those of a whole sequence do. Sinks and window are on every share, and count on the first.
"""

from dataclasses import dataclass, field
from math import ceil
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.tree_util import register_dataclass
from jaxtyping import Array, Bool, Int

from pallas_kernels.primitives.period import PERIOD
from turboquant_jax.cache.angles import FINE
from turboquant_jax.cache.config import CacheConfig

STRIPE = PERIOD * FINE
"""Tokens behind the sinks that share one coarse angle (`pre_rope`): a share has whole rows of them.
"""


@register_dataclass
@dataclass(frozen=True)
class Share:
    """Which of the blocks of every sequence are here: the stripes index, index + count, ...

    Attributes:
      index: int32, number of the share; an array, as one program runs on every device.
      count: of the shares.
      axis: of the mesh, whose devices have one share each.
    """

    index: Any
    count: int = field(metadata={"static": True})
    axis: str = field(default="context", metadata={"static": True})


class Run(NamedTuple):
    """`count` slots of a segment, from slot `first` on and around its end; none if negative."""

    first: Any
    count: Any


class Place(NamedTuple):
    """What of a sequence the token at its length sees, and where that token is written.

    Attributes:
      blocks: from which to which compressed token, counted behind the sinks.
      sinks, window: slots of the segments in full precision.
      sink_slot, window_slot: of the newest token; outside of the segment if it does not go there.
    """

    blocks: tuple[Any, Any]
    sinks: Run
    window: Run
    sink_slot: Any
    window_slot: Any


@dataclass(frozen=True)
class Layout:
    """The rule for a cache of certain sizes.

    Attributes:
      config: has the rule C(L).
      sinks, ring: slots of the segments in full precision.
      slots: blocks of a sequence, of its page table.
      share: which of the blocks are here, or None for all of them.
    """

    config: CacheConfig
    sinks: int
    ring: int
    slots: int
    share: Share | None = None

    def num_blocks(self, length):
        """Blocks that are compressed at this length, and here."""
        blocks = self.config.num_blocks(length)
        if self.share is None:
            return blocks
        stripe = STRIPE // self.config.block
        turn = stripe * self.share.count
        own = blocks % turn - self.share.index * stripe
        return blocks // turn * stripe + jnp.clip(own, 0, stripe)

    def compressed_tokens(self, length):
        """Tokens of these blocks."""
        if self.share is None:
            return self.config.compressed_tokens(length)
        return self.config.block * self.num_blocks(length)

    def number(self, block):
        """Which block of the sequence a block here is."""
        if self.share is None:
            return block
        stripe = STRIPE // self.config.block
        turns = block // stripe * self.share.count + self.share.index
        return turns * stripe + block % stripe

    def index(self, token):
        """Which token of the sequence behind the sinks one of the blocks here is."""
        if self.share is None:
            return token
        return (
            self.number(token // self.config.block) * self.config.block + token % self.config.block
        )

    def counted(self, seen):
        """What is seen in full precision, a number or a mask: nothing but on the first share."""
        if self.share is None:
            return seen
        return seen * jnp.asarray(self.share.index == 0, getattr(seen, "dtype", jnp.int32))

    def window_slot(self, position):
        """The slot of the window for a position behind the sinks."""
        return (position - self.config.sinks) % max(self.ring, 1)

    def block_slot(self, block):
        """The slot of the page table for a block."""
        return block % max(self.slots, 1)

    def block_start(self, block):
        """The position of a block's first token."""
        return self.config.sinks + self.number(block) * self.config.block

    def slot(self, length: Int[Array, "B 1"], position: Int[Array, "B S"]) -> Int[Array, "B S"]:
        """Where held positions lie in sinks, window and the tokens of the page table in a row."""
        behind = position - self.config.sinks
        block = self.block_slot(behind // self.config.block) * self.config.block
        block = self.sinks + self.ring + block + behind % self.config.block
        exact = self.sinks + self.window_slot(position)
        slot = jnp.where(position < edge(self.config, length), block, exact)
        return jnp.where(position < self.config.sinks, position, slot)

    def exact_positions(
        self, length: Int[Array, "B 1"]
    ) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
        """Position of the token in each slot of the sinks, then of the window; whether it is one.

        A slot of the window holds the newest position that belongs there, if any.
        """
        sink = jnp.arange(self.sinks)[None, :] + jnp.zeros_like(length)
        slot = jnp.arange(self.ring)[None, :]
        newest = length - 1 - self.config.sinks
        ring = newest - (newest - slot) % max(self.ring, 1) + self.config.sinks
        held = (ring >= edge(self.config, length)) & (ring >= 0)
        held = self.counted(jnp.concatenate([sink < length, held], axis=1))
        return jnp.concatenate([sink, ring], axis=1), held

    def block_positions(
        self, length: Int[Array, "B 1"]
    ) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
        """Position of every token in each slot of the page table; whether it is one."""
        last = self.num_blocks(length) - 1
        block = last - (last - jnp.arange(self.slots)[None, :]) % max(self.slots, 1)
        token = jnp.arange(self.config.block)[None, None, :]
        position = self.block_start(block)[..., None] + token
        held = jnp.broadcast_to((block >= 0)[..., None], position.shape)
        return position.reshape(block.shape[0], -1), held.reshape(block.shape[0], -1)

    def written(
        self, length: Int[Array, "B 1"], pending: Int[Array, "B 1"], token: Int[Array, "1 T"]
    ) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
        """Slots of the sinks, and of the window, for new tokens; past the end for nowhere.

        Of a chunk longer than the window only the newest tokens go there: older ones would collide.
        """
        position = length + token
        valid, behind = token < pending, position >= self.config.sinks
        newest = token >= pending - self.ring
        sink = jnp.where(valid & ~behind, position, self.sinks)
        window = jnp.where(valid & behind & newest, self.window_slot(position), self.ring)
        return sink, window

    def until_block(self, length: Int[Array, " B"]) -> Int[Array, " B"]:
        """How many more tokens complete a block: all of them see the same C(L)."""
        return edge(self.config, length) + self.config.block + self.config.window - length

    def completed(
        self, length: Int[Array, " B"], counts: Int[Array, " B"], most: int
    ) -> tuple[Int[Array, "B n"], Bool[Array, "B n"]]:
        """Slots of the blocks that `counts` tokens complete; which of the n candidates they are.

        `most` (static) is the most of the counts. Of more new blocks than there are slots only the
        newest count.
        """
        first = self.num_blocks(length)
        last = self.num_blocks(length + counts)
        candidates = ceil(most / self.config.block) if self.slots else 0
        block = first[:, None] + jnp.arange(candidates, dtype=jnp.int32)[None, :]
        filled = (block < last[:, None]) & (block >= last[:, None] - self.slots)
        return self.block_slot(block), filled


def edge(config: CacheConfig, length):
    """The first position behind the compressed blocks."""
    return config.sinks + config.compressed_tokens(length)


def sees(
    config: CacheConfig, query: Int[Array, "B T"], position: Int[Array, "B S"]
) -> Bool[Array, "B T S"]:
    """Which positions a query sees: causal, within the sliding window where there is one."""
    distance = query[:, :, None] - position[:, None, :]
    seen = distance >= 0
    return seen if config.sliding_window is None else seen & (distance < config.sliding_window)


def locate(layout: Layout, length, pending) -> Place:
    """Where the token at `length` finds what it sees, and where it goes if one is pending."""
    config = layout.config
    oldest: Any = jnp.int32(0)  # position that it sees
    start: Any = 0
    if config.sliding_window is not None:
        oldest = jnp.maximum(length + 1 - config.sliding_window, 0)
        start = jnp.maximum(oldest - config.sinks, 0)
    first = jnp.maximum(edge(config, length), oldest)
    newest = length - config.sinks
    return Place(
        blocks=(start, layout.compressed_tokens(length)),
        sinks=Run(oldest, layout.counted(jnp.minimum(length, layout.sinks) - oldest)),
        window=Run(layout.window_slot(first), layout.counted(length - first)),
        sink_slot=jnp.where(pending > 0, length, -1),
        window_slot=jnp.where((pending > 0) & (newest >= 0), layout.window_slot(length), -1),
    )


def block_slots(config: CacheConfig, capacity: int, shares: int = 1) -> int:
    """Most blocks that a sequence holds at a time; of several shares, on the first of them.

    With local attention the blocks are a ring. Of the W = `sliding_window` tokens that the next
    query sees, itself included, the newest `window` before it at least are not compressed, and the
    blocks end where those begin: ceil((W - 1 - window) / block) of them cover the rest.
    """
    slots = config.num_blocks(capacity)
    if shares > 1:
        stripe = STRIPE // config.block
        slots = slots // (stripe * shares) * stripe + min(slots % (stripe * shares), stripe)
    if config.sliding_window is None:
        return slots
    return min(slots, max(0, ceil((config.sliding_window - 1 - config.window) / config.block)))
