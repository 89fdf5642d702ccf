"""10,000 random operations against a plain Python model of the cache.

Every token has a number, written into the signs of its key (low 16 bits) and of its value (high
bits). Without rotation one bit a channel keeps signs exactly, so the numbers can be read back from
the packed bytes, here by the documented layout.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from turboquant_jax import cache

BATCH, MOST, CAPACITY, EVERY = 4, 11, 60, 100
SIGNS = cache.CodecConfig(1, rotation="identity")
PAGED = cache.CacheConfig(
    1, 1, 16, SIGNS, SIGNS, block=8, window=3, sinks=2, center_keys=False
)  # fmt: skip
RING = cache.CacheConfig(
    1, 1, 16, SIGNS, SIGNS, block=8, window=3, sinks=2, center_keys=False, sliding_window=20
)  # fmt: skip
APPEND, STEP, FORK, FREE = range(4)


def signs(numbers):
    bits = (numbers[..., None] >> jnp.arange(16).reshape(1, 1, 16)) & 1
    return (2 * bits - 1).astype(jnp.float32)[None, :, :, None, :]  # [1, B, T, 1, 16]


@jax.jit
def run(state, operations):
    """Do them one after the other; the whole of the small arrays after each."""

    def step(state, operation):
        kind, numbers, counts, rows, mask = operation
        low, high = signs(numbers & 0xFFFF), signs(numbers >> 16)
        state = lax.switch(
            kind,
            [
                lambda s: cache.append(s, low, high, counts),
                lambda s: cache.append(s, low[:, :, :1], high[:, :, :1], jnp.minimum(counts, 1)),
                lambda s: cache.fork(s, rows[0], rows[1]),
                lambda s: cache.free(s, mask),
            ],
            state,
        )
        table = state.table
        return state, (table.lengths, table.overflow, table.references, table.page_table)

    return lax.scan(step, state, operations)


def numbers_in(state, row):
    """What the arrays hold of a sequence, position by position; -1 for what a ring gave up."""
    config, length = state.config, int(state.lengths[row])
    blocks, slots = int(config.num_blocks(length)), state.table.page_table.shape[1]
    found = np.full(length, -1)
    for position in range(length):
        place = position - config.sinks
        block, token = divmod(place, config.block)
        if position < config.sinks:
            low, high = state.sinks.keys[0, row, position], state.sinks.values[0, row, position]
            found[position] = number(low[0] > 0, high[0] > 0)
        elif block >= blocks:
            slot = place % state.window.keys.shape[2]
            low, high = state.window.keys[0, row, slot], state.window.values[0, row, slot]
            found[position] = number(low[0] > 0, high[0] > 0)
        elif block >= blocks - slots:
            page = state.table.page_table[row, block % slots]
            assert page >= 0
            key = state.parts[0].pool.keys[0][0][0, page, token]  # 16 channels: 2 bytes
            value = state.parts[0].pool.values[0][0][0, page]  # 16 channels of 8 tokens: 1 byte
            low = [(key[i % 2] >> (i // 2)) & 1 for i in range(16)]
            high = [(value[i, 0] >> token) & 1 for i in range(16)]
            found[position] = number(low, high)
    return found.tolist()


def number(low, high):
    return int(sum(int(b) << i for i, b in enumerate([*low, *high])))


class Model:
    """Lists of numbers, and pages as objects that rows share."""

    def __init__(self, config, pages, slots):
        self.config, self.pages, self.slots = config, pages, slots
        self.tokens = [[] for _ in range(BATCH)]
        self.blocks = [[] for _ in range(BATCH)]  # of each row, its pages by slot
        self.overflow = [False] * BATCH
        self.made = 0

    def used(self):
        return {page for blocks in self.blocks for page in blocks}

    def do(self, kind, numbers, counts, rows, mask):
        if kind in (APPEND, STEP):
            counts = counts if kind == APPEND else np.minimum(counts, 1)
            self.append(numbers, counts)
        elif kind == FORK:
            for attribute in (self.tokens, self.blocks):
                attribute[rows[1]] = list(attribute[rows[0]])
            self.overflow[rows[1]] = self.overflow[rows[0]]
        else:
            for row in np.flatnonzero(mask):
                self.tokens[row], self.blocks[row], self.overflow[row] = [], [], False

    def append(self, numbers, counts):
        free = self.pages - len(self.used())
        for row in range(BATCH):
            length = len(self.tokens[row])
            if self.overflow[row] or length + counts[row] > CAPACITY:
                self.overflow[row] = True
                continue
            first = int(self.config.num_blocks(length))
            last = int(self.config.num_blocks(length + int(counts[row])))
            if self.slots * BATCH > self.pages:  # otherwise there is always room
                free -= last - first
                if last > first and free < 0:
                    self.overflow[row] = True
                    continue
            for block in range(max(first, last - self.slots), last):
                held = self.blocks[row] + [None] * self.slots
                held[block % self.slots] = self.made
                self.blocks[row] = [page for page in held[: self.slots] if page is not None]
                self.made += 1
            self.tokens[row] = self.tokens[row] + numbers[row, : counts[row]].tolist()

    def expected(self, row):
        """Numbers by position, as `numbers_in` gives them."""
        length, block = len(self.tokens[row]), self.config.block
        lost = int(self.config.num_blocks(length)) - self.slots
        first, last = self.config.sinks, self.config.sinks + max(0, lost) * block
        return [-1 if first <= i < last else n for i, n in enumerate(self.tokens[row])]


def draw(rng, count):
    """Operations, and unique numbers for every token that they could append."""
    kind = rng.choice(4, count, p=[0.35, 0.35, 0.15, 0.15]).astype(np.int32)
    numbers = rng.integers(0, 2**14) + np.arange(count * BATCH * MOST, dtype=np.int32)
    counts = rng.integers(0, MOST + 1, (count, BATCH), dtype=np.int32)
    rows = rng.integers(0, BATCH, (count, 2), dtype=np.int32)
    mask = rng.random((count, BATCH)) < 0.3
    return kind, numbers.reshape(count, BATCH, MOST), counts, rows, mask


@pytest.mark.parametrize(
    ("config", "count"), [(PAGED, 10_000), (RING, 2_000)], ids=["paged", "ring"]
)
def test_no_token_is_lost_and_none_seen_twice(config, count):
    rng = np.random.default_rng(11)
    operations = draw(rng, count)
    scarce = {"num_pages": 14} if config is PAGED else {}  # of the 24 that 4 rows could fill
    state = cache.create(config, BATCH, CAPACITY, key=jax.random.key(0), **scarce)
    slots = state.table.page_table.shape[1]
    model = Model(config, state.table.references.shape[0], slots)
    if config is RING:  # as if all had been used and freed: pages belong to nobody
        state = cache.free(state, jnp.ones(BATCH, bool))
    overflowed, shared = 0, 0
    for start in range(0, count, EVERY):
        some = [x[start : start + EVERY] for x in operations]
        state, after = run(state, some)
        for i, (lengths, overflow, references, table) in enumerate(
            zip(*map(np.asarray, after), strict=True)
        ):
            model.do(*(x[i] for x in some))
            assert lengths.tolist() == [len(tokens) for tokens in model.tokens]
            assert overflow.tolist() == model.overflow
            counted = np.bincount(table[table >= 0], minlength=len(references))
            np.testing.assert_array_equal(references, counted)
            assert np.count_nonzero(counted) == len(model.used())
            overflowed += overflow.sum()
            shared += (references > 1).any()
        numpy_state = jax.tree.map(np.asarray, state)
        for row in range(BATCH):
            assert numbers_in(numpy_state, row) == model.expected(row)
    assert run._cache_size() <= 2, "one compilation a config"
    assert shared > count / 10
    assert overflowed > count / 10 or config is RING
