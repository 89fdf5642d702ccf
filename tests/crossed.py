"""A cache of each setting of `design`, with any bytes in it, and its attention in float64."""

from dataclasses import replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_attention import schedule
from pallas_kernels.primitives import triton
from tests.design import SETTINGS, config_of
from tests.layout import QUICK, calibration, decoded, random_parts
from turboquant_jax import cache
from turboquant_jax.attention import Scores, attend, attend_and_write
from turboquant_jax.cache.layout import block_slots

BATCH, CAPACITY, COUNT, LAYER = 3, 300, 3, 1
LARGE = 60.0  # of the first query head: logits far above 88, where exp overflows


def softmax_attention(config, tokens, q, position, scores, sink_logits):
    """One query [N, H] over {position: (key, value)}, float64."""
    kept = [
        kv for p, kv in tokens.items()
        if p <= position and (config.sliding_window or np.inf) > position - p
    ]  # fmt: skip
    keys, values = (np.stack([kv[i] for kv in kept]) for i in (0, 1))  # [S, K, H]
    group = q.shape[0] // keys.shape[1]
    keys, values = (np.repeat(x, group, axis=1) for x in (keys, values))
    logits = np.einsum("nh,snh->ns", q, keys) * (scores.scale or q.shape[1] ** -0.5)
    if scores.softcap is not None:
        logits = scores.softcap * np.tanh(logits / scores.softcap)
    extra = -np.inf if sink_logits is None else sink_logits[:, None]
    top = np.maximum(logits.max(-1, keepdims=True), extra)
    weight = np.exp(logits - top)
    total = weight.sum(-1, keepdims=True) + np.exp(extra - top)
    return np.einsum("ns,snh->nh", weight / total, values)


def create(name):
    """An empty cache of a setting."""
    setting = SETTINGS[name]
    config = config_of(setting)
    rng = np.random.default_rng(1)
    options = {}
    if setting["groups"] == "calibrated":
        options = {"calibration": calibration(config)}
    if setting["groups"] == "outliers":
        every = np.tile(np.arange(config.head_dim, dtype=np.int32), (2, 2, 1))
        options = {f"{side}_order": rng.permuted(every, axis=-1) for side in ("key", "value")}
    if setting["paged"]:
        options["num_pages"] = BATCH * block_slots(config, CAPACITY) + 3
    make = lambda: cache.create(config, BATCH, CAPACITY, key=jax.random.key(2), **options)  # noqa: E731
    return jax.jit(make, compiler_options=QUICK)()


def append_both_ways(empty, steps):
    """The cache after chunks of these counts [steps, B], and after the same tokens one by one."""
    config, steps = empty.config, np.asarray(steps, np.int32)
    most, total = int(steps.max()), int(steps.sum(0).max())
    rng = np.random.default_rng(5)
    shape = (2, BATCH, total + most, 2, config.head_dim)  # behind the last token: padding
    k, v = (jnp.asarray(rng.normal(1, 1, shape), jnp.float32) for _ in range(2))

    @partial(jax.jit, compiler_options=QUICK)
    def run(state, k, v, steps):
        def append(state, start_and_counts, most):
            start, counts = start_and_counts
            at = (start[:, None] + jnp.arange(most)[None])[None, :, :, None, None]
            tokens = [jnp.take_along_axis(x, at, axis=2) for x in (k, v)]
            return cache.append(state, *tokens, counts), None

        starts = jnp.cumsum(steps, 0) - steps
        chunked, _ = jax.lax.scan(partial(append, most=most), state, (starts, steps))
        start = jnp.broadcast_to(jnp.arange(total)[:, None], (total, BATCH))
        one = (start < jnp.sum(steps, 0)[None]).astype(jnp.int32)
        return chunked, jax.lax.scan(partial(append, most=1), state, (start, one))[0]

    return run(empty, k, v, jnp.asarray(steps))


class Case:
    """A filled cache, new tokens for it, and what attention over both is in float64."""

    def __init__(self, name):
        setting, rng = SETTINGS[name], np.random.default_rng(3)
        empty = create(name)
        self.config = config = empty.config
        lengths = [0, 57, CAPACITY - COUNT] if setting["ragged"] else [CAPACITY - 9] * BATCH
        slots, pages = empty.table.page_table.shape[1], empty.table.references.shape[0]
        table = rng.permutation(pages)[: BATCH * slots].reshape(BATCH, slots)
        if setting["paged"]:  # what no sequence has filled has no page
            held = config.num_blocks(np.asarray(lengths))[:, None]
            table = np.where(np.arange(slots)[None] < held, table, -1)
        self.state = replace(empty, **random_parts(empty, rng)).with_table(
            page_table=jnp.asarray(table, jnp.int32),
            lengths=jnp.asarray(lengths, jnp.int32),
            pending=jnp.asarray([1, 1, 0], jnp.int32),
        )
        self.scores = Scores(0.3, setting["softcap"]) if setting["softcap"] else Scores()
        heads = 2 * setting["group"]
        # as large as the logarithm of the number of tokens: not to be overlooked
        self.sink_logits = rng.normal(5, 1, heads).astype(np.float32)
        if not setting["sink_logits"]:
            self.sink_logits = None
        shapes = [(BATCH, COUNT, n, config.head_dim) for n in (heads, 2, 2)]
        self.q, self.k, self.v = (rng.normal(0, 1, s).astype(np.float32) for s in shapes)
        self.q[:, :, 0] *= LARGE

    @property
    def sinks(self):
        """Sink logits as the library takes them."""
        return None if self.sink_logits is None else jnp.asarray(self.sink_logits)

    def expected(self, count):
        """Output [B, count, N, H] over the decoded vectors."""
        rounded = [np.asarray(jnp.asarray(x, self.config.dtype), float) for x in (self.k, self.v)]
        found = np.zeros(self.q[:, :count].shape)
        for row in range(BATCH):
            tokens, start = decoded(self.state, LAYER, row), int(self.state.lengths[row])
            tokens |= {start + t: [x[row, t] for x in rounded] for t in range(count)}
            for t in range(count):
                q = self.q[row, t].astype(float)
                found[row, t] = softmax_attention(
                    self.config, tokens, q, start + t, self.scores, self.sink_logits
                )
        return found

    def largest_logit(self):
        """Of the first new token's first head, over everything that it sees, without a cap."""
        logits = [
            self.q[row, 0, 0].astype(float) @ key[0] * self.config.head_dim**-0.5
            for row in range(BATCH)
            for key, _ in decoded(self.state, LAYER, row).values()
        ]
        return max(logits)

    def splits(self):
        """Programs that share the blocks of a sequence."""
        slots, block = self.state.table.page_table.shape[1], self.config.block
        return slots * block // schedule.TILE_TOKENS // schedule.MIN_TILES

    def definition(self):
        """The output of all new tokens by XLA."""

        @partial(jax.jit, compiler_options=QUICK)
        def run(state, q, k, v):
            options = dict(scores=self.scores, sink_logits=self.sinks)
            return attend(state, LAYER, q, k, v, **options, implementation="xla")

        return np.asarray(run(self.state, *map(jnp.asarray, (self.q, self.k, self.v))))

    def kernel(self):
        """Of the first new token by the interpreted kernel: output, and the cache, by kernel
        and by definition, with the token where it is pending.
        """

        @partial(jax.jit, compiler_options=QUICK)
        def run(state, *new):
            options = dict(scores=self.scores, sink_logits=self.sinks)
            out, written = attend_and_write(state, LAYER, *new, **options, implementation="pallas")
            return out, written, cache.write(state, LAYER, *new[1:], implementation="xla")

        with triton.interpreted():
            new = (jnp.asarray(x[:, :1]) for x in (self.q, self.k, self.v))
            out, *caches = run(self.state, *new)
        return np.asarray(out), *caches


@lru_cache(maxsize=2)
def case(name):
    """Once for the tests of a setting."""
    return Case(name)
