"""The decode kernel: a program attends with one query group to one split of one sequence.

Tokens lie on the rows of the scores (S^T = K q^T) and channels on the rows of the output
(O^T = V^T P^T), so that codes are the left operand of both products: they go from shared memory to
registers, become int8 levels there and feed the tensor cores. The right operands, q and P, are
15-bit integers in two base-128 digits; a head owns two neighbouring columns, high digit and low
digit, so that up to four heads fill the narrowest product without a loss. All sums over integers
are exact.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.decode_attention import deal
from pallas_kernels.decode_attention.deal import Piece
from pallas_kernels.decode_attention.exact import (
    EMPTY,
    attend_exact,
    mean_score,
    nan_unless_finite,
    query_parts,
    write_newest,
)
from pallas_kernels.decode_attention.phases import MANY, turning
from pallas_kernels.decode_attention.scores import BIAS, BOUND, DecodePlan, Refs, prepare_query
from pallas_kernels.decode_attention.tile import attend, place_of
from pallas_kernels.decode_attention.uncoded import PARTS
from pallas_kernels.primitives import triton
from pallas_kernels.primitives.digits import PHASES, UNITS
from pallas_kernels.primitives.period import PERIOD

# What a split leaves.
PART = ("peak", "weight", "sums")
# What a pool has of its own among the inputs.
POOL = ("keys", "values", "scales", "bases", "key_tables", "value_tables")


def decode_kernel(inputs: Refs, outputs: Refs, *, plans: tuple[DecodePlan, ...]) -> None:
    """One program of the grid (split, kv head, sequence); writes the sums of its pieces.

    The one that has the last piece of a sequence also attends to the tokens in full precision, and
    has fewer blocks for it. Of several `plans`, one for each format, the program takes that of its
    head: the only branch. Then the grid is (split, sequence, place among `heads`).
    """
    plan, head = plans[0], triton.program_id(1)
    split, sequence = triton.program_id(0), triton.program_id(2)
    if "heads" in inputs:
        head, sequence = sequence, head
        inputs, outputs = of_head(inputs, outputs, inputs["heads"][head, 2])
    if not plan.dealt:
        work = work_of(plan, inputs, sequence)
        begin = lax.div(split * work, plan.splits)
        end = lax.div((split + 1) * work, plan.splits)
        slot = sequence * plan.splits + split
        attend_piece(inputs, outputs, plans, Piece(head, sequence, begin, end, slot))
        return
    work = work_of(plan, inputs, deal.sequences(plan.batch))
    stretch = deal.find(plan.batch, plan.splits, work)

    @triton.when(split == 0)
    def _() -> None:
        found = deal.pieces_of(plan.batch, plan.splits, work, sequence)
        for i, x in enumerate(found):
            triton.store(outputs["dealt"].at[sequence, jnp.full((1,), i)], jnp.full((1,), x))

    def body(i: jax.Array, start: jax.Array) -> jax.Array:
        sequence = stretch.first + i
        end = work_of(plan, inputs, sequence)
        piece = Piece(
            head, sequence,
            jnp.maximum(stretch.begin - start, 0), jnp.minimum(stretch.end - start, end),
            stretch.number + sequence,
        )  # fmt: skip
        attend_piece(inputs, outputs, plans, piece)
        return start + end

    triton.rare_loop(stretch.last - stretch.first + 1, body, stretch.start)


def of_head(inputs: Refs, outputs: Refs, head: jax.Array) -> tuple[Refs, Refs]:
    """What is of one kv head, as blocks of it would be, of a head that only the program knows."""

    def segment(ref: Any) -> Any:
        return triton.Row(ref, head, axis=len(ref.shape) - 2)

    def vectors(ref: Any) -> Any:
        return triton.Row(ref, head, axis=1)

    inputs = inputs | {"queries": [vectors(x) for x in inputs["queries"]]}
    outputs = outputs | {name: triton.Row(outputs[name], head) for name in PART}
    if "exact" in inputs:
        exact = inputs["exact"]
        inputs["exact"] = dataclasses.replace(
            exact,
            query=vectors(exact.query),
            keys=tuple(map(segment, exact.keys)),
            values=tuple(map(segment, exact.values)),
            key_mean=None if exact.key_mean is None else segment(exact.key_mean),
        )
        outputs["exact"] = {name: vectors(ref) for name, ref in outputs["exact"].items()}
        for name in ("keys", "values"):
            if name in outputs:
                outputs[name] = tuple(map(segment, outputs[name]))
    return inputs, outputs


def work_of(plan: DecodePlan, inputs: Refs, sequence: jax.Array) -> jax.Array:
    """Tiles of a sequence, or of a vector of them, with what full precision counts for."""
    load = lambda ref: triton.load(ref.at[sequence])  # noqa: E731
    seen = (0, load(inputs["lengths"]))
    if "exact" in inputs:
        exact = inputs["exact"]
        seen = exact.places(seen[1], load(exact.pending)).blocks
    return tiles_of(plan, seen, turns_of(inputs)).count + plan.exact_tiles


def attend_piece(inputs: Refs, outputs: Refs, plans: tuple[DecodePlan, ...], piece: Piece) -> None:
    """A piece of a sequence, with the tokens in full precision if it is the last one."""
    plan, sequence = plans[0], piece.sequence
    length, row = inputs["lengths"][sequence], sequence
    if "place" in inputs:
        row = sequence + inputs["place"][1] * plan.batch
    inputs = inputs | {
        "queries": [triton.Row(x, sequence) for x in inputs["queries"]],
        "page_table": triton.Row(inputs["page_table"], sequence),
    }
    parts = outputs | {name: triton.Row(outputs[name], piece.slot) for name in PART}
    if "exact" not in inputs:
        attend_blocks(inputs, parts, plans, piece, row, (0, length))
        return
    exact = inputs["exact"]
    places = exact.places(length, exact.pending[sequence])
    exact = dataclasses.replace(exact, query=triton.Row(exact.query, sequence))
    work = tiles_of(plan, places.blocks, turns_of(inputs)).count + plan.exact_tiles

    @triton.when(piece.end == work)
    def _() -> None:
        rows = [row] * (len(exact.keys) - 1) + [sequence]
        peak, weight, sums = attend_exact(
            exact, places, rows, plan.columns, plan.heads, plan.scale, plan.soft_cap,
        )  # fmt: skip
        of_exact = {name: triton.Row(outputs["exact"][name], sequence) for name in PART}
        store_part(of_exact, plan, peak, weight)
        channel = jnp.arange(sums.shape[0])[:, None]
        exists = jnp.broadcast_to(channel < sum(plan.value_channels), sums.shape)
        column = jnp.arange(plan.columns)[None, :]
        triton.store(of_exact["sums"].at[channel, column], sums, mask=exists)
        if "keys" in outputs:
            write_newest(exact, places, rows, outputs["keys"], outputs["values"])

    attend_blocks(inputs | {"exact": exact}, parts, plans, piece, row, places.blocks)


class Tiles(NamedTuple):
    """The blocks from `first` on that are seen, from `seen` on: their number, `count` of tiles."""

    first: Any
    seen: Any
    blocks: Any
    count: Any


def tiles_of(plan: DecodePlan, seen: tuple, turns: bool) -> Tiles:
    """Those with the tokens from seen[0] up to seen[1]; of one sequence or of a vector of them."""
    start, length = seen
    first = seen_first = (
        jnp.int32(0) if is_zero(start) else lax.div(start, like(start, plan.tokens))
    )
    if turns and plan.tokens < PERIOD:  # tiles are whole turns
        first = first - lax.rem(first, like(first, PERIOD // plan.tokens))
    blocks = lax.div(length + plan.tokens - 1, like(length, plan.tokens)) - first
    blocks = jnp.maximum(blocks, 0)
    return Tiles(
        first, seen_first, blocks, lax.div(blocks + plan.pages - 1, like(blocks, plan.pages))
    )


def is_zero(start: Any) -> bool:
    """Whether the first block is seen whatever the length."""
    return isinstance(start, int) and start == 0


def like(x: Any, value: int) -> jax.Array:
    """A constant of its shape."""
    return jnp.full_like(x, value)


def turns_of(inputs: Refs) -> bool:
    """Whether the keys of the blocks have a mean that turns."""
    exact = inputs.get("exact")
    return exact is not None and exact.key_mean is not None and exact.phases is not None


def store_part(refs: Refs, plan: DecodePlan, peak: jax.Array, weight: jax.Array) -> None:
    """What a split leaves, but for its sums."""
    column = jnp.arange(plan.columns)
    triton.store(refs["peak"].at[column], peak)
    triton.store(refs["weight"].at[column], weight)


def attend_blocks(
    inputs: Refs,
    outputs: Refs,
    plans: tuple[DecodePlan, ...],
    piece: Piece,
    row: jax.Array,
    seen: tuple,
) -> None:
    """`attend_format` in the format of the program's head."""
    pools = [inputs | {name: inputs[name][number] for name in POOL} for number in range(len(plans))]

    def pool_row() -> jax.Array:
        return piece.head + inputs["place"][0] if "place" in inputs else piece.head

    if len(plans) == 1:
        attend_format(pools[0], outputs, plans[0], piece, row, pool_row, seen)
        return
    own = triton.uniform(inputs["heads"][piece.head, 0])
    its_row = inputs["heads"][piece.head, 1]
    for number, (pool, plan) in enumerate(zip(pools, plans, strict=True)):

        @triton.when(own == number)
        def _(pool: Refs = pool, plan: DecodePlan = plan) -> None:
            attend_format(pool, outputs, plan, piece, row, lambda: its_row, seen)


def attend_format(
    inputs: Refs,
    outputs: Refs,
    plan: DecodePlan,
    piece: Piece,
    row: jax.Array,
    pool_row: Callable[[], jax.Array],
    seen: tuple,
) -> None:
    """A split of the blocks, of which the tokens from seen[0] up to seen[1] are seen.

    `row` is that of the sequence among the means, `pool_row` that of the head in its pool.
    """
    start, length = seen
    every = is_zero(start)
    means = "exact" in inputs and inputs["exact"].key_mean is not None
    turns = turns_of(inputs)
    many = turns and plan.columns > MANY
    early = turns and "heads" not in inputs
    first, seen_first, blocks, tiles = tiles_of(plan, seen, turns)
    begin, end = jnp.minimum(piece.begin, tiles), jnp.minimum(piece.end, tiles)
    slots, first_page = inputs["page_table"].shape[0], pool_row() * plan.row_pages

    def slot_of(block):
        if slots > 1:
            return lax.rem(block, slots)
        # 0, which the compiler must not see: of a load that no turn changes it makes no pipeline,
        # and crashes
        return jnp.minimum(lax.rem(block, 2), 0)

    def pages_of(i):  # beyond the last block its page stands in, unseen
        last = jnp.maximum(first + blocks - 1, 0)
        block = [jnp.minimum(first + i * plan.pages + j, last) for j in range(plan.pages)]
        if first is not seen_first:
            block = [jnp.maximum(x, jnp.minimum(seen_first, last)) for x in block]
        found = [inputs["page_table"][slot_of(x)] for x in block]
        return found if early else in_pool(found)

    def in_pool(pages):
        return [page + first_page for page in pages]

    def body(i, carry):
        # The page ids of the next tile are read a turn ahead: read in the turn that loads the
        # pages, they would be copied to shared memory first and cost the pipeline a stage.
        # So are the angles, and the digits that they make.
        # What a turn leaves for the next is loaded a turn ahead only if it is what was loaded: with
        # `first_page` added, page ids are loaded in the turn that waits for them after all. Loops
        # of several formats have no register for that.
        sums, pages, angles, digits = carry
        if early:
            pages = in_pool(pages)
        block, ahead = first + i * plan.pages, (pages_of(i + 1), None, None)
        if many:
            digits = state["turning"].digits(angles)
            ahead = ahead[0], state["turning"].angles(turn_of(i + 1)), None
        elif turns:
            ahead = (
                ahead[0],
                state["turning"].angles(turn_of(i + 2)),
                state["turning"].digits(angles),
            )
        return attend(plan, inputs, state, block, pages, sums, digits), *ahead

    def turn_of(i):
        return lax.div((first + i * plan.pages) * plan.tokens, PERIOD)

    pages = pages_of(begin)
    state: Refs = {"length": length} | ({} if every else {"start": start})
    state["queries"] = [
        prepare_query(plan, inputs["queries"][keys.source], keys) for keys in plan.key_sums
    ]
    if plan.uncoded[0]:
        keys = inputs["keys"][0][0]
        state["uncoded_query"], _ = query_parts(
            inputs["queries"][0], plan.columns, plan.heads, keys.dtype, PARTS
        )
    state["key_tables"] = [
        group.decoder.prepare(refs)
        for group, refs in zip(plan.key_groups, inputs["key_tables"], strict=True)
    ]
    state["value_tables"] = [
        decoder.prepare(refs)
        for decoder, refs in zip(plan.value_decoders, inputs["value_tables"], strict=True)
    ]
    angles = digits = None
    if turns or plan.columns > MANY:
        for name in ("key_tables", "value_tables"):
            state[name] = [in_registers(tables) for tables in state[name]]
    if turns:
        places = [
            which * plan.tokens + token
            for which, token in map(partial(place_of, plan), range(PHASES))
        ]
        state["turning"] = turning(
            inputs["exact"], row, plan.scale, plan.heads, plan.columns, plan.warps,
            (plan.pages * plan.tokens, places),
        )  # fmt: skip
        angles = state["turning"].angles(turn_of(begin))
        if not many:
            digits = state["turning"].digits(angles)
            angles = state["turning"].angles(turn_of(begin + 1))
    elif means:
        mean = mean_score(inputs["exact"], row, plan.columns, plan.heads, plan.scale)
        state["mean"] = mean[None, :], jnp.ones((1, 1))

    columns = plan.columns
    zeros = jnp.zeros((plan.value_order.columns // PHASES, columns), jnp.float32)
    accumulators = tuple(
        jnp.zeros((plan.value_rows(g), columns), jnp.float32)
        for g in range(len(plan.value_channels))
    )
    carry = (
        jnp.full((columns,), EMPTY, jnp.float32),
        zeros,
        tuple(zeros if decoder.centre else None for decoder in plan.value_decoders),
        accumulators,
    )
    (peak, weight, mass, sums), _, _, _ = lax.fori_loop(
        begin, end, body, (carry, pages, angles, digits)
    )
    weight = weight.sum(axis=0)
    weight = jnp.where(weight >= 0.0, weight, jnp.nan)
    store_part(outputs, plan, peak - BIAS, weight)
    write_output(plan, outputs["sums"], mass, sums)


def in_registers(tables: Any) -> Any:
    """The words of a look-up, each in a register of its own; other tables as they are."""
    return [triton.in_lanes(word) for word in tables] if isinstance(tables, list) else tables


def write_output(plan: DecodePlan, ref: Any, mass: tuple, sums: tuple) -> None:
    """Takes the centre out, and stores the groups of channels one after the other."""
    if plan.uncoded[1]:
        store_channels(plan, ref, nan_unless_finite(sums[0]), (0, plan.value_channels[0]))
        return
    first = 0
    for decoder, count, lost, output in zip(
        plan.value_decoders, plan.value_channels, mass, sums, strict=True
    ):
        output = output * (BOUND / UNITS)
        if decoder.centre:
            output = output - (lost.sum(axis=0) * decoder.centre)[None, :]
        store_channels(plan, ref, output, (first, count), decoder.codebook.step)
        first += count


def store_channels(
    plan: DecodePlan, ref: Any, output: jax.Array, channels: tuple[int, int], step: float = 1.0
) -> None:
    """Rows of an output, times `step`, as channels (first, count)."""
    first, count = channels
    channel = jnp.arange(output.shape[0])[:, None]
    place = ref.at[first + channel, jnp.arange(plan.columns)[None, :]]
    exists = jnp.broadcast_to(channel < count, output.shape)
    triton.store(place, output * step, mask=exists)
