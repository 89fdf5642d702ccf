"""The static half of a call of decode attention: decoders, sums and splits, from shapes alone."""

from pallas_kernels.decode_attention.exact import LOG2E, ExactOperand
from pallas_kernels.decode_attention.inputs import PagedBlocks, Sketch, Softmax
from pallas_kernels.decode_attention.schedule import (
    TILE_TOKENS,
    Schedule,
    Work,
    default_schedule,
)
from pallas_kernels.decode_attention.scores import DecodePlan, KeyGroup, KeySum, key_sum
from pallas_kernels.primitives.blocks import BlocksOperand
from pallas_kernels.primitives.codebook import CodebookOperand
from pallas_kernels.primitives.gather import key_decoder, value_decoders

# Steps of groups of keys that are one sum: at most so many times apart.
ALIKE = 4.0
# Bits of a channel in full precision, whose bytes take as long as those of the blocks.
EXACT_BITS = 16
# Levels that one or two look-ups answer.
FEW_LEVELS = 16
SIGNS = CodebookOperand(bits=1, levels=(-1, 1), step=1.0)


def schedule_of(
    blocks: PagedBlocks,
    exact: ExactOperand | None,
    kv_heads: int,
    heads: int,
    work: Work | None = None,
) -> Schedule:
    """What serves these shapes, where the caller has no schedule; `heads` of a kv head.

    `work` of a tile, unless it is to be found: who compiles otherwise than XLA may know better.
    """
    batch, max_pages = blocks.page_table.shape
    sides = [
        ([book.bits for book in books] or [EXACT_BITS], channels)
        for pool in blocks.pools
        for books, channels in (
            (pool.key_codebooks, pool.key_channels),
            (pool.value_codebooks, pool.value_channels),
        )
    ]
    bits = max(
        sum(bits * count for bits, count in zip(*side, strict=True)) / sum(side[1])
        for side in sides
    )
    of_sides = [x for pool in blocks.pools for x in (pool.key_codebooks, pool.value_codebooks)]
    little = all(x and all((b.bits, b.code) == (4, "scalar") for b in x) for x in of_sides)
    little = little and not any(pool.bases for pool in blocks.pools)  # scales of 8 bits are work
    widest = max(bits for widths, _ in sides for bits in widths)
    if any(x and all(len(b.levels) > FEW_LEVELS for b in x) for x in of_sides):
        widest = max(widest, 5)  # of a trellis of 4 bits, too, the words of four tables
    turns = exact is not None and exact.phases is not None
    if work is None:
        work = "usual" if not little else "little and turning" if turns else "little"
    slots = 0 if exact is None else sum(x.shape[1] for x in exact.keys)
    return default_schedule(
        sequences=batch * kv_heads,
        heads=heads,
        channels=max(max(pool.value_channels) for pool in blocks.pools),
        bits=widest,
        tokens=blocks.pools[0].scales[0].shape[2],
        max_pages=max_pages,
        exact=int(slots * EXACT_BITS / bits),
        work=work,
        formats=len(blocks.pools),
    )


def make_decode_plan(
    pool: BlocksOperand,
    sketch: Sketch | None,
    softmax: Softmax,
    schedule: Schedule,
    sizes: tuple[int, int],
    *,
    exact: bool,
    dealt: bool,
) -> DecodePlan:
    """The static half of a call for the heads of a pool; ValueError for tiles that are too short.

    `sizes`: sequences, and query heads of a kv head.
    """
    _, pages, tokens = pool.scales[0].shape
    if schedule.pages * tokens < TILE_TOKENS:
        raise ValueError(
            f"tiles: got {schedule.pages} pages of {tokens} tokens, "
            f"expected at least {TILE_TOKENS} tokens"
        )
    scale = softmax.scale * (1.0 if softmax.soft_cap is not None else LOG2E)
    key_sums = _key_sums(pool, scale)
    if sketch is not None:
        decoder = key_decoder(SIGNS, sketch.query.shape[-1])
        group = KeyGroup(decoder, len(pool.keys), 0, 1.0)
        signs = key_sum((group,), source=1, word=len(pool.scales), multiplier=scale)
        key_sums = (*key_sums, signs)
    return DecodePlan(
        tokens=tokens,
        pages=schedule.pages,
        heads=sizes[1],
        key_sums=key_sums,
        value_decoders=value_decoders(pool.value_codebooks, tokens, schedule.pages),
        value_channels=pool.value_channels,
        value_words=pool.value_words,
        scale=scale,
        soft_cap=softmax.soft_cap,
        batch=sizes[0],
        row_pages=pages,
        exact_tiles=schedule.exact_tiles if exact else 0,
        splits=schedule.splits,
        warps=schedule.warps,
        stages=schedule.stages,
        dealt=dealt,
        uncoded=(not pool.key_codebooks, not pool.value_codebooks),
    )


def _key_sums(pool: BlocksOperand, scale: float) -> tuple[KeySum, ...]:
    """Of the keys: groups that share a scale share a sum, where their steps are alike."""
    found: list[KeySum] = []
    for word, groups in _by_unit(pool):
        step = max(book.step for _, book in groups)
        members = tuple(
            KeyGroup(
                key_decoder(book, pool.key_channels[g]),
                planes=g,
                first=sum(pool.key_channels[:g]),
                gain=book.step / step,
            )
            for g, book in groups
        )
        found.append(key_sum(members, source=0, word=word, multiplier=scale * step))
    return tuple(found)


def _by_unit(pool: BlocksOperand) -> list[tuple[int, list[tuple[int, CodebookOperand]]]]:
    """(word of the scales, (number, codebook) of each group) of sums over groups.

    A query is rounded to the unit of its largest group, and the rounding counts as many times as a
    level has steps. So levels are made as small integers as the others' steps allow, and steps more
    than `ALIKE` times apart are not added up.
    """
    if not pool.joint[0] or len(pool.keys) == 1:
        return [(pool.key_words[g], [(g, book)]) for g, book in enumerate(pool.key_codebooks)]
    books = dict(enumerate(pool.key_codebooks))
    left, found = sorted(books, key=lambda g: -books[g].step / books[g].most), []
    while left:
        unit = books[left[0]].step / books[left[0]].most  # the coarsest of the finest
        made = {g: books[g].refined(unit) for g in sorted(left)}
        own = {g: book for g, book in made.items() if book.step * ALIKE >= unit}
        found.append((0, list(own.items())))
        left = [g for g in left if g not in own]
    return found
