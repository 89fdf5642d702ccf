"""A cache whose layers, or heads, have bits of their own: head by head that of uniform bits."""

import itertools
from dataclasses import replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.crossed import softmax_attention
from tests.layout import QUICK, decoded, random_parts, row_of_head
from turboquant_jax import cache
from turboquant_jax.attention import Scores, attend, attend_and_write
from turboquant_jax.cache import Allocation, CodecConfig
from turboquant_jax.cache.allocation import Losses, mean_bits
from turboquant_jax.cache.bytes import bytes_per_compressed_token, count_bytes, planned_bytes
from turboquant_jax.cache.choice import choose
from turboquant_jax.cache.state import rows_of
from turboquant_jax.cache.storage import restore, save

BY_LAYER = Allocation((3, 1, 3), (2, 4, 2))  # two parts, of two layers and of one
# three parts: of two heads, of a head and a layer, and of one head
BY_HEAD = Allocation(((3, 1), 1, (1, 3)), (2, 2, (4, 2)))
BOTH = pytest.mark.parametrize("allocation", [BY_LAYER, BY_HEAD], ids=["by layer", "by head"])
LAYERS, HEADS = 3, 2
CONFIG = cache.CacheConfig(
    LAYERS, HEADS, 8, CodecConfig(8, "haar"), CodecConfig(8), block=8, window=5, sinks=2
)
BATCH, CAPACITY = 3, 44
COUNTS = [([20, 7, 0], 20), ([1, 1, 1], 1), ([11, 20, 3], 20), *[([1, 1, 0], 1)] * 9]


def empty(allocation, config=CONFIG, **options):
    config = replace(config, allocation=allocation)
    return cache.create(config, BATCH, CAPACITY, key=jax.random.key(1), **options)


def uniform(kind, **options):
    """A cache of these bits everywhere."""
    key, value = (
        replace(own, bits=bits) for own, bits in zip((CONFIG.key, CONFIG.value), kind, strict=True)
    )
    config = replace(CONFIG, key=key, value=value)
    return cache.create(config, BATCH, CAPACITY, key=jax.random.key(1), **options)


def tokens(most, seed):
    shape = (LAYERS, BATCH, most, HEADS, 8)
    k, v = np.random.default_rng(seed).normal(1, 1, (2, *shape)).astype(np.float32)
    shape = (LAYERS, BATCH, most, 2 * HEADS, 8)
    q = np.random.default_rng(seed + 99).normal(0, 1, shape).astype(np.float32)
    return map(jnp.asarray, (q, k, v))


@partial(jax.jit, donate_argnums=0, compiler_options=QUICK)
def step(state, q, k, v, counts):
    """A pass through all layers, as a decoder makes it."""
    state, outputs = cache.begin(state, counts, q.shape[2]), []
    for layer in range(LAYERS):
        output, state = attend_and_write(state, layer, q[layer], k[layer], v[layer])
        outputs.append(output)
    return cache.commit(state), jnp.stack(outputs)


@partial(jax.jit, donate_argnums=0, compiler_options=QUICK)
def uniform_step(state, q, k, v, counts):
    """The same of layers that can be scanned, in a third of the program."""

    def layer(state, xs):
        output, state = attend_and_write(state, *xs)
        return state, output

    state = cache.begin(state, counts, q.shape[2])
    state, outputs = jax.lax.scan(layer, state, (jnp.arange(LAYERS), q, k, v))
    return cache.commit(state), outputs


def kind_of(allocation, layer, head):
    """(bits of keys, bits of values) of a head, by the entries as they were given."""
    entries = allocation.keys[layer], allocation.values[layer]
    return tuple(entry[head] if isinstance(entry, tuple) else entry for entry in entries)


def assert_heads_are_those_of_uniform_bits(state, allocation, others, same_bits):
    """Every block, bit by bit, and the codec it was made with; and what all heads share."""
    for layer in range(LAYERS):
        for head in range(HEADS):
            held = []
            for one in (state, others[kind_of(allocation, layer, head)]):
                part, row = row_of_head(one, layer, head)
                held.append((part.codecs, jax.tree.map(lambda x, row=row: x[row], part.pool)))
            same_bits(*held)
    for other in others.values():
        for name in ("sinks", "window", "key_mean", "tables"):
            same_bits(getattr(state, name), getattr(other, name))


@pytest.mark.parametrize("allocation", [BY_HEAD], ids=["by head"])  # by layer: the golden digests
def test_a_head_is_that_of_uniform_bits_bit_by_bit(allocation, same_bits):
    """Ragged chunks and steps, donated; what is shared, and what does not fit, too.

    Caches of uniform bits get chunks of 20 throughout, so that each is compiled once: chunks and
    single tokens give them the same bits, as `test_laws` shows.
    """
    state = empty(allocation)
    others = {kind: uniform(kind) for kind in allocation.kinds}
    for seed, (counts, most) in enumerate([*COUNTS, ([20, 2, 1], 20)]):
        whole, counts = list(tokens(20, seed)), jnp.asarray(counts)
        state, outputs = step(state, *(x[:, :, :most] for x in whole), counts)
        expected = {}
        for kind in others:
            others[kind], made = uniform_step(others[kind], *whole, counts)
            expected[kind] = made[:, :, :most]
        for layer in range(LAYERS):
            for head in range(HEADS):
                of_head = np.s_[layer, :, :, 2 * head : 2 * head + 2]
                made, own = outputs[of_head], expected[kind_of(allocation, layer, head)][of_head]
                if allocation is BY_LAYER:
                    np.testing.assert_array_equal(made, own)
                else:  # sums of fewer heads at a time may be taken in another order
                    np.testing.assert_allclose(made, own, rtol=1e-5, atol=1e-6)
    assert state.overflow.tolist() == [True, False, False]
    assert CONFIG.num_blocks(np.asarray(state.lengths)).tolist() == [4, 4, 0]
    assert_heads_are_those_of_uniform_bits(state, allocation, others, same_bits)


@BOTH
def test_chunks_give_the_bits_of_single_tokens(allocation, same_bits):
    chunked, singly = empty(allocation), empty(allocation)
    counts = np.asarray([20, 17, 3])
    q, k, v = tokens(20, 0)
    chunked, _ = step(chunked, q, k, v, jnp.asarray(counts))
    for i in range(20):
        now = (x[:, :, i : i + 1] for x in (q, k, v))
        singly, _ = step(singly, *now, jnp.asarray(i < counts, jnp.int32))
    assert CONFIG.num_blocks(counts).tolist() == [1, 1, 0]
    same_bits(chunked, singly)


append, fork, free = (
    jax.jit(f, compiler_options=QUICK) for f in (cache.append, cache.fork, cache.free)
)


def append_fork_and_free(state):
    _, k, v = tokens(20, 0)
    state = append(state, k, v, jnp.asarray([20, 20, 9]))
    state = append(fork(state, 0, 2), k, v, jnp.asarray([2, 2, 2]))
    state = free(state, jnp.asarray([False, True, False]))
    return append(state, k, v, jnp.asarray([19, 0, 9]))


@lru_cache
def appended_forked_and_freed(kind):
    """A cache of uniform bits, once for both allocations."""
    return append_fork_and_free(uniform(kind, num_pages=7))


@BOTH
def test_append_fork_and_free_are_those_of_uniform_bits(allocation, same_bits):
    state = append_fork_and_free(empty(allocation, num_pages=7))
    others = {kind: appended_forked_and_freed(kind) for kind in allocation.kinds}
    assert_heads_are_those_of_uniform_bits(state, allocation, others, same_bits)
    assert np.asarray(state.table.references).max() == 2, "a page is shared"
    with pytest.raises(ValueError, match=r"got \(2, .*, expected \[3 layers, B, T, K, H\]"):
        cache.append(state, *(x[:2] for x in list(tokens(20, 0))[1:]))


@BOTH
@pytest.mark.parametrize("sliding_window", [None, 20])
def test_attention_is_that_over_the_decoded_vectors(allocation, sliding_window):
    """In float64, of any bytes; to the rounding of float32."""
    config = replace(CONFIG, dtype="float32", sliding_window=sliding_window)
    state, rng = empty(allocation, config), np.random.default_rng(7)
    lengths = [CAPACITY - 3, 30, 4]
    state = replace(state, **random_parts(state, rng)).with_lengths(jnp.asarray(lengths))
    scores, sink_logits = Scores(0.3, 5.0), rng.normal(2, 1, 2 * HEADS).astype(np.float32)
    q, k, v = (x[:, :, :3] for x in tokens(20, 1))

    @partial(jax.jit, compiler_options=QUICK)
    def run(state, q, k, v):
        options = dict(scores=scores, sink_logits=jnp.asarray(sink_logits), implementation="xla")
        return [attend(state, i, q[i], k[i], v[i], **options) for i in range(LAYERS)]

    for layer, output in enumerate(run(state, q, k, v)):
        for row, length in enumerate(lengths):
            held = decoded(state, layer, row)
            new = (np.asarray(x[layer, row], np.float64) for x in (k, v))
            held |= {length + t: pair for t, pair in enumerate(zip(*new, strict=True))}
            for t in range(3):
                query = np.asarray(q[layer, row, t], np.float64)
                expected = softmax_attention(
                    config, held, query, length + t, scores, sink_logits.astype(np.float64)
                )
                np.testing.assert_allclose(output[row, t], expected, rtol=2e-5, atol=2e-5)


@BOTH
def test_write_is_write(allocation):
    _, k, v = tokens(1, 0)
    begun = cache.begin(empty(allocation), jnp.ones(BATCH, jnp.int32), 1)
    written = cache.write(begun, 2, k[2], v[2])
    np.testing.assert_array_equal(written.sinks.keys[2, :, 0], k[2, :, 0].astype(jnp.bfloat16))
    assert not begun.sinks.keys.any() and not written.sinks.keys[:2].any()


def test_a_part_has_the_heads_of_its_bits():
    """`pool` has a row for each of them; a page is one in every part."""
    state = jax.eval_shape(partial(empty, BY_HEAD))
    assert BY_HEAD.kinds == ((3, 2), (1, 2), (1, 4))
    assert state.config.places == ((0, 1), (1,), (2, 0))
    pages = state.table.references.shape[0]
    assert [part.pool.scales[0].shape for part in state.parts] == [
        (rows, pages, 8) for rows in (2, 3, 1)
    ]
    for part, (key, value) in zip(state.parts, BY_HEAD.kinds, strict=True):
        rows = part.pool.scales[0].shape[0]
        assert sum(plane.size for plane in part.pool.keys[0]) == rows * pages * 8 * key
        assert sum(plane.size for plane in part.pool.values[0]) == rows * pages * 8 * value
    assert state.sinks.keys.shape[0] == LAYERS and state.sinks.keys.shape[3] == HEADS


@pytest.mark.parametrize("bits", [(3, 1, 1, 3), (3, 1, 4, 3)])
def test_heads_that_are_picked_apart_join_in_their_order(bits):
    """Of four heads: what brings two or three back in order is the order they were taken in."""
    config = replace(CONFIG, num_layers=1, num_kv_heads=4)
    shape = jax.eval_shape(lambda: empty(Allocation((bits,), (2,)), config))
    rows = rows_of(shape, 0)
    x = jnp.arange(3 * 4 * 5).reshape(3, 4, 5)
    parts = [member.pick(x, axis=1) for member in rows.members]
    assert [part.shape[1] for part in parts] == [bits.count(b) for b in dict.fromkeys(bits)]
    np.testing.assert_array_equal(rows.join(parts, axis=1), x)


def test_equal_bits_are_one_part_that_can_be_scanned():
    alike = Allocation((3, (3, 3), 3), (2, 2, (2, 2)))
    state = jax.eval_shape(partial(empty, alike))
    plain = jax.eval_shape(partial(uniform, (3, 2)))
    assert jax.tree.leaves(state) == jax.tree.leaves(plain)
    q, k, v = jax.eval_shape(lambda: tuple(tokens(1, 0)))

    def scanned(state, *new):
        return jax.lax.scan(lambda s, x: (s, attend(s, *x)), state, (jnp.arange(LAYERS), *new))

    assert jax.eval_shape(scanned, state, q, k, v)[1].shape == q.shape


@pytest.mark.parametrize(
    ("config", "allocation"),
    [
        (CONFIG, BY_LAYER),
        (CONFIG, BY_HEAD),
        (replace(CONFIG, sinks=0), BY_HEAD),
        (cache.CacheConfig(LAYERS, 3, 64), BY_LAYER),
        (cache.CacheConfig(LAYERS, 3, 64), Allocation((8, (1, 5, 1), 7), ((3, 2, 1), 4, 4))),
    ],
)
def test_planned_is_allocated(config, allocation):
    config = replace(config, allocation=allocation)
    state = jax.jit(lambda: cache.create(config, 2, 517, key=jax.random.key(0)))()
    planned = planned_bytes(config, 2, 517)
    assert planned == count_bytes(state)
    assert planned.total == state.nbytes == sum(x.nbytes for x in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("allocation", "parts"),
    [
        (Allocation((4, 2, 1, 5), (2, 2, 3, 1)), 4),
        (Allocation(((4, 2, 3), 3, (1, 3, 5), 3), (2, (1, 2, 3), 2, 2)), 7),
    ],
    ids=["by layer", "by head"],
)
def test_bytes_are_those_of_uniform_bits_in_the_same_sum(allocation, parts):
    """Page tables and windows are there once; a part's signs of 64 channels are not."""
    config = cache.CacheConfig(4, 3, 64, CodecConfig(3), CodecConfig(2))
    own = replace(config, allocation=allocation)
    plain, planned = planned_bytes(config, 2, 4000), planned_bytes(own, 2, 4000)
    assert replace(planned, codecs=plain.codecs) == plain
    assert planned.codecs == parts * plain.codecs
    assert bytes_per_compressed_token(own) == bytes_per_compressed_token(config)


@BOTH
def test_a_donated_step_allocates_nothing_of_the_size_of_the_cache(allocation):
    config = replace(CONFIG, allocation=allocation)
    shapes = jax.eval_shape(partial(cache.create, config, BATCH, 9000, key=jax.random.key(0)))
    _, k, v = jax.eval_shape(lambda: tuple(tokens(1, 0)))
    counts = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    compiled = jax.jit(cache.append, donate_argnums=0).lower(shapes, k, v, counts).compile()
    memory = compiled.memory_analysis()
    fresh = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert fresh < 8 * 4 * shapes.table.page_table.size < shapes.nbytes / 5


@BOTH
def test_it_comes_back_bit_by_bit(allocation, tmp_path, same_bits):
    state, rng = empty(allocation), np.random.default_rng(0)
    state = replace(state, **random_parts(state, rng)).with_lengths(jnp.asarray([44, 3, 20]))
    save(state, tmp_path / "prompt", model="m")
    same_bits(restore(empty(allocation), tmp_path / "prompt", model="m"), state)
    swapped = {  # arrays of the same shapes
        BY_LAYER: Allocation((3, 3, 1), (2, 2, 4)),
        BY_HEAD: Allocation(((3, 1), 1, (3, 1)), (2, 2, (2, 4))),
    }[allocation]
    same_shapes = jax.tree.leaves(jax.eval_shape(partial(empty, swapped)))
    assert same_shapes == jax.tree.leaves(jax.eval_shape(lambda: state))
    for other in (empty(swapped), uniform((3, 2))):
        with pytest.raises(ValueError, match="got config"):
            restore(other, tmp_path / "prompt", model="m")


@BOTH
def test_a_layer_that_is_not_known_while_tracing_is_refused(allocation):
    state, (q, k, v) = jax.eval_shape(partial(empty, allocation)), tokens(1, 0)

    def scanned(state, q, k, v):
        def one(state, layer):
            return state, attend(state, layer, q[0], k[0], v[0])

        return jax.lax.scan(one, state, jnp.arange(LAYERS))

    with pytest.raises(ValueError, match="expected one that is known while tracing"):
        jax.eval_shape(scanned, state, q, k, v)
    for layer in (3, -1):
        with pytest.raises(ValueError, match=f"layer: got {layer}, expected 0 to 2"):
            cache.write(empty(allocation), layer, k[0], v[0])


@pytest.mark.parametrize(
    ("keys", "values", "says"),
    [
        ((), (), "got bits of 0 and 0 layers, expected as many"),
        ((3, 2), (3,), "got bits of 2 and 1 layers, expected as many"),
        ((3, 9), (3, 3), "got 9 for the keys of layer 1, expected integers between 1 and 8"),
        ((3, 3), (0, 3), "got 0 for the values of layer 0, expected integers between 1 and 8"),
        ((3, 3), (3, (3, 9)), "got 9 for the values of layer 1"),
        ((3, True), (3, 3), "got True for the keys of layer 1, expected integers"),
        ((3, 3), (3, 3), "got bits of 2 layers, expected 3"),
        ((3, 3, (3, 2, 1)), (3, 3, 3), "got 3 heads for the keys of layer 2, expected 2"),
        ((3, 3, 3), ((), 3, 3), "got 0 heads for the values of layer 0, expected 2"),
        ((3, ((4, 4), (3, 1)), 3), (3, 3, 3), r"got groups \(\(4, 4\), \(3, 1\)\) for the keys of"),
        ((3, (((4, 4), (4, 9)), 2), 3), (3, 3, 3), "got 9 for the keys of layer 1"),
    ],
)
def test_allocations_that_cannot_be(keys, values, says):
    with pytest.raises(ValueError, match=says):
        replace(CONFIG, allocation=Allocation(keys, values))


def random_losses(rng, layers, heads, keys, values):
    """Losses that fall with the bits, as they do, and menus in which a split has its mean."""
    drawn = []
    for menu in (keys, values):
        fall = 4.0 ** -np.asarray([mean_bits(bits) for bits in menu])
        size = rng.lognormal(0, 2, (layers, heads, 1)) * rng.lognormal(0, 0.3, (1, 1, len(menu)))
        drawn.append(tuple(tuple(map(tuple, layer)) for layer in (size * fall).tolist()))
    return Losses(keys, values, *drawn)


SPLIT = ((2, 4), (2, 2), (4, 1))


def all_choices(losses, costs):
    """(loss, cost) of every allocation of 2 layers of 2 heads, by brute force."""
    menus = (range(len(losses.key_formats)), range(len(losses.value_formats)))
    pairs = list(itertools.product(*menus))
    found = []
    for chosen in itertools.product(pairs, repeat=4):
        loss = cost = 0.0
        for (i, j), (layer, head) in zip(chosen, itertools.product((0, 1), repeat=2), strict=True):
            loss += losses.keys[layer][head][i] + losses.values[layer][head][j]
            cost += costs[0][i] + costs[1][j]
        found.append((loss, cost))
    return np.asarray(found)


@pytest.mark.parametrize("seed", range(6))
def test_no_allocation_of_its_bytes_loses_less(seed):
    """Against all of them; what is left of the budget buys no better format of one head."""
    losses = random_losses(np.random.default_rng(seed), 2, 2, (1, 3, SPLIT), (1, 2))
    costs = ([10.0, 30.0, 21.0], [10.0, 20.0])
    every = all_choices(losses, costs)
    for budget in (80, 97, 111, 140, 155, 199, 200):
        allocation = choose(losses, costs, budget)
        chosen = [
            (losses.key_formats.index(key), losses.value_formats.index(value))
            for layer in allocation.layers
            for key, value in (layer if len(layer) == 2 else layer * 2)
        ]
        spent = sum(costs[0][i] + costs[1][j] for i, j in chosen)
        loss = losses.of(allocation)
        assert spent <= budget
        # at least as good as the best of every budget that is smaller by a step of one head
        best = every[every[:, 1] <= budget - 30][:, 0].min(initial=np.inf)
        assert loss <= best + 1e-12
        assert loss >= every[every[:, 1] <= budget][:, 0].min() - 1e-12
    with pytest.raises(ValueError, match="budget: got 79"):
        choose(losses, costs, 79)


def test_a_layer_has_few_formats():
    """Of 12 heads that want everything; one format is the best that all can share."""
    losses = random_losses(np.random.default_rng(3), 2, 12, (1, 2, 3, 4), (1, 2, 3, 4))
    costs = ([1.0, 2.0, 3.0, 4.0],) * 2
    free = choose(losses, costs, 100, most=16, kinds=16)
    assert max(len(set(layer)) for layer in free.layers) > 4
    previous = losses.of(free)
    for most in (4, 2, 1):
        found = choose(losses, costs, 100, most=most, kinds=16)
        assert max(len(set(layer)) for layer in found.layers) <= most
        assert losses.of(found) >= previous
        previous = losses.of(found)
    # one format a layer: by brute force over both
    of_layers = (
        np.asarray(losses.keys).sum(1)[..., None] + np.asarray(losses.values).sum(1)[:, None]
    )
    cost = np.add.outer(costs[0], costs[1]) * 12
    both = of_layers[0].ravel()[:, None] + of_layers[1].ravel()[None]
    fits = cost.ravel()[:, None] + cost.ravel()[None] <= 100
    assert previous <= both[fits].min() * 1.3


@pytest.mark.parametrize("seed", range(3))
def test_a_cache_has_few_formats(seed):
    """Two for all heads: against the best pair of them by brute force, a step of one head apart."""
    losses = random_losses(np.random.default_rng(seed), 5, 2, (1, 2, 3), (1, 2))
    menus = list(itertools.product((1, 2, 3), (1, 2)))
    costs = ([10.0, 20.0, 30.0], [10.0, 20.0])
    of_heads = np.reshape([losses.keys[i][h] for i in range(5) for h in (0, 1)], (10, 3, 1))
    of_heads = of_heads + np.reshape(
        [losses.values[i][h] for i in range(5) for h in (0, 1)], (10, 1, 2)
    )
    cost, of_heads = 10.0 * np.asarray([k + v for k, v in menus]), of_heads.reshape(10, 6)

    def best(budget):
        found = []
        for i, j in itertools.combinations(range(6), 2):
            dear, cheap = (i, j) if cost[i] > cost[j] else (j, i)
            gains = np.sort(of_heads[:, cheap] - of_heads[:, dear])[::-1]
            step = cost[dear] - cost[cheap]
            rest = budget - 10 * cost[cheap]
            gains = gains[: int(rest // step)] if step else gains
            if rest >= 0:
                found.append(of_heads[:, cheap].sum() - np.maximum(gains, 0).sum())
        return min(found)

    for budget in (230, 300, 370):
        allocation = choose(losses, costs, budget, kinds=2)
        assert len(allocation.kinds) <= 2
        assert best(budget) - 1e-12 <= losses.of(allocation) <= 1.05 * best(budget - 10)
    assert len(choose(losses, costs, 300).kinds) > 2


def test_it_prints_a_summary():
    text = repr(jax.eval_shape(partial(empty, BY_LAYER)))
    assert "key=3, 1 bits, value=2, 4 bits" in text and "nbytes=" in text
