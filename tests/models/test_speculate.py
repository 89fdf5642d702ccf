"""Speculative decoding: the answers of plain decoding, in fewer passes; drafts that are draws."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from turboquant_jax import cache
from turboquant_jax.cache import CacheConfig, CodecConfig
from turboquant_jax.models import dense, generate, speculate
from turboquant_jax.models.drafts import LONGEST, Draft, by_model, continuation, look_up
from turboquant_jax.models.generate import NO_TOKEN, pad_prompts, prefill
from turboquant_jax.models.model import Llama, unstack
from turboquant_jax.models.options import GREEDY, Sampling
from turboquant_jax.models.past import COMPRESSED, compressed
from turboquant_jax.models.sampling import probabilities

PROMPTS = [[5, 6, 7, 8] * 9, [11, 12], [3, 3, 4, 9, 3, 3, 4]]
TOKENS = 60
SAMPLED = Sampling(temperature=0.7, top_k=20)


@pytest.fixture(scope="module")
def config(tiny_config):
    return dataclasses.replace(tiny_config, head_dim=16, max_position=128)


@pytest.fixture(scope="module")
def model(config):
    return jax.jit(lambda: Llama(config, nnx.Rngs(3), jnp.float32))()


@pytest.fixture(scope="module")
def other(config):
    """A smaller one, that agrees with it by chance."""
    small = dataclasses.replace(config, num_layers=1)
    return jax.jit(lambda: Llama(small, nnx.Rngs(4), jnp.float32))()


def past_of(config, **options):
    """An empty cache in which blocks of 8 tokens are compressed, one at many steps."""
    made = CacheConfig(
        config.num_layers, 2, 16, CodecConfig(3), CodecConfig(2), block=8, window=3, sinks=2,
        dtype="float32", **options,
    )  # fmt: skip
    return cache.create(made, len(PROMPTS), 36 + TOKENS, key=jax.random.key(2))


KEYS = jax.random.split(jax.random.key(5), len(PROMPTS))


def read(model, state, past=COMPRESSED):
    """Logits behind the prompts, their lengths, the state."""
    tokens, lengths = map(jnp.asarray, pad_prompts(PROMPTS))
    logits, state = prefill(model, tokens, lengths, state, past)
    return logits, lengths, state


def plain(model, state, sampling, past=COMPRESSED):
    """`generate.decode` of the prompts."""
    logits, lengths, state = read(model, state, past)
    return generate.decode(
        model, logits, lengths, KEYS, state, past, max_tokens=TOKENS, sampling=sampling
    )


def text():
    """The prompts, with room for the answers."""
    return jnp.pad(jnp.asarray(pad_prompts(PROMPTS)[0]), ((0, 0), (0, TOKENS)))


def same(found, expected):
    """The same answers, and a past of the same length."""
    np.testing.assert_array_equal(found.generation.tokens, expected.tokens)
    np.testing.assert_array_equal(found.generation.counts, expected.counts)
    np.testing.assert_array_equal(found.generation.state.lengths, expected.state.lengths)
    assert not found.generation.state.overflow.any()
    # a pass gives a token of the model's own, the first came from the prompt; a stop ends a draft
    own = np.asarray(found.generation.counts - 1 - found.accepted)
    assert (own <= found.passes).all() and (found.passes <= own + 1).all()
    assert (found.accepted <= found.drafted).all() and (found.accepted >= 0).all()


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_looked_up_drafts_change_no_token(model, config, sampling):
    """Also drawn ones: a draft without a choice stays where it is what was drawn."""
    whole = plain(model, past_of(config), sampling)
    # a token that stops the second row in the middle, of those that the others make late or never
    stop = int(whole.tokens[1, 20])
    stops = (np.asarray(whole.tokens) == stop).cumsum(axis=1)
    behind = np.pad(stops, ((0, 0), (1, 0)))[:, :-1] > 0
    counts = jnp.asarray((~behind).sum(axis=1))
    assert int(counts[1]) <= 21 and int(counts.max()) > 21
    ended = dataclasses.replace(
        whole,
        tokens=jnp.where(behind, NO_TOKEN, whole.tokens),
        counts=counts,
        state=whole.state.with_lengths(whole.state.lengths + counts - whole.counts),
    )
    logits, lengths, state = read(model, past_of(config))
    found = speculate.decode(
        model, logits, lengths, KEYS, state, COMPRESSED, look_up(4), text(),
        max_tokens=TOKENS, sampling=dataclasses.replace(sampling, eos_ids=(stop,)),
    )  # fmt: skip
    same(found, ended)
    if sampling.temperature == 0:  # random weights soon repeat themselves
        assert int(found.accepted.sum()) > 10


def test_a_sliding_window_and_a_dense_past_take_tokens_back_too(config):
    local = dataclasses.replace(config, sliding_window=22)
    model = jax.jit(lambda: Llama(local, nnx.Rngs(3), jnp.float32))()
    sliding = past_of(config, sliding_window=22)
    expected = plain(model, sliding, GREEDY)
    logits, lengths, state = read(model, past_of(config, sliding_window=22))
    options = dict(max_tokens=TOKENS)
    same(
        speculate.decode(
            model, logits, lengths, KEYS, state, COMPRESSED, look_up(7), text(), **options
        ),
        expected,
    )
    model = unstack(model)
    full = lambda: dense.create(config, 3, 36 + TOKENS, jnp.float32)  # noqa: E731
    expected = plain(model, full(), GREEDY, dense.DENSE)
    logits, lengths, state = read(model, full(), dense.DENSE)
    same(
        speculate.decode(
            model, logits, lengths, KEYS, state, dense.DENSE, look_up(7), text(), **options
        ),
        expected,
    )


@pytest.mark.parametrize("mine", [True, False], ids=["itself", "another"])
def test_a_model_drafts(model, other, config, mine):
    """Every draft of the model itself is right; of another one the answers are right."""
    expected = plain(model, past_of(config), GREEDY)
    guesser = model if mine else other
    logits, lengths, state = read(model, past_of(config))
    _, _, own = read(guesser, past_of(guesser.config))
    found = speculate.decode(
        model, logits, lengths, KEYS, state, COMPRESSED, by_model(4, COMPRESSED), own,
        draft_model=guesser, max_tokens=TOKENS,
    )  # fmt: skip
    same(found, expected)
    if mine:
        np.testing.assert_array_equal(found.accepted, found.drafted)
        assert (np.asarray(found.passes) < TOKENS / 2).all()


def test_drafts_that_are_draws_leave_the_distribution(config):
    """Four tokens of 4: their joint frequencies in 8,192 rows, against the model's probabilities.

    A chi-square test at the level of 1e-3, its seed fixed.
    """
    small = dataclasses.replace(config, vocab_size=4, num_layers=1, hidden_size=16)
    make = jax.jit(lambda key: Llama(small, nnx.Rngs(key), jnp.float32))
    model, guesser = make(jax.random.key(1)), make(jax.random.key(2))
    sampling, rows, prompt = Sampling(temperature=0.9, top_p=0.97), 8192, [1, 2, 3]
    full = CacheConfig(1, 2, 16, block=8, window=24, sinks=0, dtype="float32")
    past = compressed("xla")
    tokens, lengths = jnp.asarray([prompt] * rows), jnp.full(rows, 3, jnp.int32)
    empty = lambda n: cache.create(full, n, 16, key=jax.random.key(0))  # noqa: E731
    logits, state = prefill(model, tokens, lengths, empty(rows), past)
    _, own = prefill(guesser, tokens, lengths, empty(rows), past)
    keys = jax.random.split(jax.random.key(9), rows)
    found = speculate.decode(
        model, logits, lengths, keys, state, past, by_model(2, past), own,
        draft_model=guesser, max_tokens=4, sampling=sampling,
    )  # fmt: skip
    got = np.asarray(found.generation.tokens)
    share = float(found.accepted.sum() / found.drafted.sum())
    assert 0.2 < share < 0.95, "some drafts stay, some do not"
    expected = np.ones(())
    for count in range(4):  # probabilities of all continuations, by whole passes
        several = np.indices((4,) * count).reshape(count, 4**count).T
        texts = np.concatenate([np.tile(prompt, (len(several), 1)), several], axis=1)
        n = jnp.full(len(texts), 3 + count, jnp.int32)
        logits, _ = prefill(model, jnp.asarray(texts, jnp.int32), n, empty(len(texts)), past)
        p = np.asarray(probabilities(logits, sampling), np.float64)
        expected = expected[..., None] * p.reshape((4,) * (count + 1))
    seen = np.zeros((4, 4, 4, 4))
    np.add.at(seen, tuple(got.T), 1)
    assert not seen[expected == 0].any(), "a token that is filtered out"
    often = expected * rows >= 5
    bins = (
        np.append(seen[often], seen[~often].sum()),
        np.append(expected[often], expected[~often].sum()),
    )
    bins = [x[bins[1] > 0] for x in bins]
    assert len(bins[0]) > 40
    assert stats.chisquare(bins[0], rows * bins[1] / bins[1].sum()).pvalue > 1e-3


@pytest.mark.parametrize("counts", [0, 1, 2])
def test_the_rule_keeps_as_many_as_can_be(counts):
    """Of one p and q: min(p, q) summed is how often a draft stays, and p what is drawn.

    20,000 rows; binomial and chi-square tests at the level of 1e-3, their seeds fixed.
    """
    rows, rng = 20_000, np.random.default_rng(2)
    logits, guessed = (rng.normal(0, 1.5, (1, n, 6)).astype(np.float32) for n in (3, 2))
    sampling = Sampling(temperature=1.0, top_k=4)
    p, q = (
        np.asarray(probabilities(jnp.asarray(x[0]), sampling), np.float64)
        for x in (logits, guessed)
    )
    drafts = np.stack([rng.choice(6, rows, p=x / x.sum()) for x in q], axis=1).astype(np.int32)
    many = lambda x: jnp.broadcast_to(jnp.asarray(x), (rows, *x.shape[1:]))  # noqa: E731
    draft = Draft(jnp.asarray(drafts), jnp.full(rows, counts, jnp.int32), many(guessed))
    keys, position = jax.random.split(jax.random.key(4), rows), jnp.full(rows, 7, jnp.int32)
    judge = jax.jit(speculate.judge, static_argnames="sampling")
    made, accepted = map(np.asarray, judge(many(logits), draft, keys, position, sampling=sampling))
    stays = np.minimum(p[:2], q).sum(axis=1)
    alive = np.ones(rows, bool)
    for i in range(counts + 1):
        seen = np.bincount(made[alive, i], minlength=6)
        kept = p[i] > 0
        assert not seen[~kept].any()
        assert stats.chisquare(seen[kept], alive.sum() * p[i][kept] / p[i].sum()).pvalue > 1e-3
        if i < counts:
            right = int((accepted[alive] > i).sum())
            assert stats.binomtest(right, int(alive.sum()), float(stays[i])).pvalue > 1e-3
        alive = alive & (accepted > i)
    assert accepted.max() == counts


def test_look_up_finds_the_longest_end_that_occurred_before():
    """Against a search by hand, over texts of two and three letters; of equals the newest."""
    rng = np.random.default_rng(0)
    size, rows = 50, 60
    texts = rng.integers(0, rng.integers(2, 4, (rows, 1)), (rows, size)).astype(np.int32)
    texts[0] = np.arange(size)  # nothing occurred before
    texts[1] = 7
    last = rng.integers(0, size, rows).astype(np.int32)
    last[:3] = size - 1, size - 1, 0

    def by_hand(text):
        ends = range(1, len(text))
        lengths = [
            next((n for n in range(min(end, LONGEST)) if text[end - 1 - n] != text[-1 - n]),
                 min(end, LONGEST))
            for end in ends
        ]  # fmt: skip
        longest = max(lengths, default=0)
        return (
            max(end for end, n in zip(ends, lengths, strict=True) if n == longest)
            if longest
            else -1
        )

    found = jax.jit(continuation)(jnp.asarray(texts), jnp.asarray(last))
    assert found.tolist() == [
        by_hand(t[: n + 1].tolist()) for t, n in zip(texts, last, strict=True)
    ]
    # behind the end of the text, the end goes on as a period
    drafter = look_up(5)
    text = jnp.asarray([[1, 2, 9, 1, 2, 0, 0], [4, 5, 6, 7, 8, 0, 0]], jnp.int32)
    one = jnp.asarray([4, 4], jnp.int32)
    turn = speculate.Turn(one, one, jnp.asarray([5, 5], jnp.int32), KEYS[:2])
    draft, _ = drafter.draft(None, text, turn, GREEDY)
    assert draft.tokens[0].tolist() == [9, 1, 2, 9, 1]
    assert draft.counts.tolist() == [4, 0]


def test_what_cannot_be_is_refused(model, config, past):
    for tokens in (0, 8):
        with pytest.raises(ValueError, match=f"got {tokens}, expected 1 to 7"):
            look_up(tokens)
    with pytest.raises(ValueError, match="takes no tokens back"):
        by_model(4, past)
    state, lengths = jax.eval_shape(lambda: past_of(config)), jnp.ones(3, jnp.int32)
    call = lambda past, n: jax.eval_shape(  # noqa: E731
        lambda state: speculate.decode(
            model, jnp.zeros((3, 97)), lengths, KEYS, state, past, look_up(4), text(), max_tokens=n
        ),
        state,
    )
    with pytest.raises(ValueError, match="takes no tokens back"):
        call(past, 3)
    with pytest.raises(ValueError, match="max_tokens: got 0"):
        call(COMPRESSED, 0)
