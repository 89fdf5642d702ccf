"""Generation: ragged batches, chunks, stops and streams give what one row at a time gives."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from turboquant_jax import cache
from turboquant_jax.models import dense
from turboquant_jax.models.decoding import generate, read, stream
from turboquant_jax.models.generate import NO_TOKEN, Past, decode, pad_prompts, prefill
from turboquant_jax.models.model import unstack
from turboquant_jax.models.options import Sampling
from turboquant_jax.models.past import COMPRESSED

PROMPTS = [[5, 17, 60, 3, 44, 81, 9], [12], [90, 33, 2, 71]]
SAMPLED = Sampling(temperature=1.0, top_k=40, top_p=0.95)
SIZE = 32


@pytest.fixture(scope="module")
def keys():
    return jax.random.split(jax.random.key(11), len(PROMPTS))


@pytest.fixture
def run(tiny, past, empty, keys):
    """`run(rows, **options)`: generate for these rows of PROMPTS."""

    def run(rows=(0, 1, 2), max_tokens=12, **options):
        tokens, lengths = (jnp.asarray(x)[jnp.array(rows)] for x in pad_prompts(PROMPTS))
        state = empty(tiny.config, len(rows), SIZE)
        own_keys = keys[jnp.array(rows)]
        return generate(
            tiny, tokens, lengths, own_keys, state, past, max_tokens=max_tokens, **options
        )

    return run


def test_greedy_equals_whole_forward_passes(tiny, forward, run):
    got = run()
    for prompt, row in zip(PROMPTS, np.asarray(got.tokens), strict=True):
        ids = list(prompt)
        for token in row:
            padded = jnp.array([ids + [0] * (20 - len(ids))], jnp.int32)
            assert token == np.argmax(forward(tiny, padded)[0, len(ids) - 1])
            ids.append(int(token))
    np.testing.assert_array_equal(got.counts, [12, 12, 12])
    # the last token has not been fed
    np.testing.assert_array_equal(got.state.lengths, [7 + 11, 1 + 11, 4 + 11])


def test_rows_do_not_depend_on_the_batch(run):
    whole = run(sampling=SAMPLED)
    for row in range(3):
        alone = run((row,), sampling=SAMPLED)
        np.testing.assert_array_equal(alone.tokens[0], whole.tokens[row])


@pytest.mark.parametrize("chunk", [1, 3, 50])
def test_chunks_fill_the_same_past(tiny, past, empty, chunk):
    tokens, lengths = map(jnp.asarray, pad_prompts(PROMPTS))
    logits, state = prefill(tiny, tokens, lengths, empty(tiny.config, 3, SIZE), past)
    got, chunked = prefill(tiny, tokens, lengths, empty(tiny.config, 3, SIZE), past, chunk=chunk)
    np.testing.assert_allclose(got, logits, atol=1e-5)
    chex.assert_trees_all_close(chunked, state, atol=1e-5)
    np.testing.assert_array_equal(chunked.lengths, lengths)
    for row, prompt in enumerate(PROMPTS):  # padding left nothing behind
        assert not chunked.keys[:, row, len(prompt) :].any()


def test_a_second_prefill_goes_on_where_the_first_ended(tiny, past, empty):
    tokens, lengths = map(jnp.asarray, pad_prompts([PROMPTS[0]]))
    logits, _ = prefill(tiny, tokens, lengths, empty(tiny.config, 1, SIZE), past)
    three, four = jnp.array([3], jnp.int32), jnp.array([4], jnp.int32)
    _, state = prefill(tiny, tokens[:, :4], three, empty(tiny.config, 1, SIZE), past)
    got, _ = prefill(tiny, tokens[:, 3:], four, state, past, start=three)
    np.testing.assert_allclose(got, logits, atol=1e-5)


def test_a_row_stops_after_a_stop_token(run):
    free = np.asarray(run().tokens)
    first = np.unique(free[0], return_index=True)[1].max()  # the newest token of the row
    stop = int(free[0, first])
    assert 0 < first < 11
    got = run(sampling=Sampling(eos_ids=(stop, 96)))
    for row, without in zip(np.asarray(got.tokens), free, strict=True):
        where = np.flatnonzero(without == stop)
        length = int(where[0]) + 1 if len(where) else len(without)
        np.testing.assert_array_equal(row[:length], without[:length])
        assert (row[length:] == NO_TOKEN).all()
    counts = (np.asarray(got.tokens) != NO_TOKEN).sum(axis=1)
    assert counts[0] == first + 1
    np.testing.assert_array_equal(got.counts, counts)
    np.testing.assert_array_equal(got.state.lengths, counts + np.array([6, 0, 3]))


def test_the_loop_ends_with_the_last_row(tiny, past, empty, run):
    """Every row stops at its first token: no forward pass follows the prefill."""
    everything = tuple(range(97))
    got = run(sampling=Sampling(eos_ids=everything))
    np.testing.assert_array_equal(got.counts, [1, 1, 1])
    np.testing.assert_array_equal(got.state.lengths, [7, 1, 4])


def test_stream_equals_decode_and_compiles_one_step(tiny, past, empty, keys, run):
    stop = int(run(sampling=SAMPLED).tokens[0, 4])
    expected = run(sampling=replace(SAMPLED, eos_ids=(stop,)))
    begin = chex.assert_max_traces(past.begin, n=2)  # the prompts, the step
    counted = Past(begin, past.attend, past.commit)
    tokens, lengths = map(jnp.asarray, pad_prompts(PROMPTS))
    logits, state = prefill(tiny, tokens, lengths, empty(tiny.config, 3, SIZE), counted)
    options = dict(max_tokens=12, sampling=replace(SAMPLED, eos_ids=(stop,)))
    steps = list(stream(tiny, logits, lengths, keys, state, counted, **options))
    np.testing.assert_array_equal(
        np.stack(steps, axis=1), expected.tokens[:, : int(expected.counts.max())]
    )


def test_decoding_in_two_calls_equals_one(tiny, past, empty, keys, run):
    """Keys are folded with the position, so a cut changes nothing."""
    whole = np.asarray(run(sampling=SAMPLED).tokens)
    first = run(sampling=SAMPLED, max_tokens=6)
    lengths = jnp.asarray(pad_prompts(PROMPTS)[1])
    one = jnp.ones_like(lengths)
    logits, state = prefill(tiny, first.tokens[:, -1:], one, first.state, past, start=lengths + 5)
    second = decode(tiny, logits, lengths + 6, keys, state, past, max_tokens=6, sampling=SAMPLED)
    np.testing.assert_array_equal(np.hstack([first.tokens, second.tokens]), whole)


def test_one_compilation_serves_the_whole_generation(tiny, past, empty, keys):
    """A pass is traced once for the prompts and once for all decoding steps, whatever the text."""
    begin = chex.assert_max_traces(past.begin, n=2)
    attend = chex.assert_max_traces(past.attend, n=2)
    counted = Past(begin, attend, past.commit)
    for prompts in (PROMPTS, [p[::-1] for p in PROMPTS]):
        tokens, lengths = map(jnp.asarray, pad_prompts(prompts))
        state = empty(tiny.config, 3, SIZE)
        got = generate(tiny, tokens, lengths, keys, state, counted, max_tokens=12)
        assert got.tokens.shape == (3, 12)


def test_the_state_is_donated(tiny, past, empty):
    tokens, lengths = map(jnp.asarray, pad_prompts(PROMPTS))
    state = empty(tiny.config, 3, SIZE)
    prefill(tiny, tokens, lengths, state, past)
    assert state.keys.is_deleted() and state.values.is_deleted()


@pytest.fixture(params=["dense", "compressed"])
def small(request):
    """`small(config, batch, capacity)`: a past of the library without tokens, and its use."""
    if request.param == "dense":
        return lambda config, *size: (dense.create(config, *size, jnp.float32), dense.DENSE)

    def create(config, *size):
        codec = cache.CodecConfig(rotation="haar")
        sizes = config.num_layers, config.num_kv_heads, config.head_dim
        exact = dict(block=8, window=8, sinks=0, dtype="float32")  # no rounding to hide behind
        settings = cache.CacheConfig(*sizes, codec, codec, **exact)
        return cache.create(settings, *size, key=jax.random.key(0)), COMPRESSED

    return create


def test_reading_with_padding_beyond_the_capacity(tiny, small):
    """18 tokens, padded to 32, in a past of 24: what 18 tokens without padding leave."""
    model, prompt = unstack(tiny), [[(7 * i) % 90 + 3 for i in range(18)]]
    tokens, lengths = map(jnp.asarray, pad_prompts(prompt))
    state, past = small(model.config, 1, 24)
    expected, state = prefill(model, tokens, lengths, state, past)
    got, read_lengths, padded = read(model, prompt, *small(model.config, 1, 24))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    chex.assert_trees_all_close(padded, state, atol=1e-5)
    np.testing.assert_array_equal(read_lengths, [18])


def test_a_row_without_room_is_an_error(tiny, small, keys):
    """Prompts of 7, 1 and 4 tokens and a capacity of 10: the first row runs full, and is named."""
    model = unstack(tiny)
    tokens, lengths = map(jnp.asarray, pad_prompts(PROMPTS))
    call = lambda state, past: (model, tokens, lengths, keys, state, past)  # noqa: E731
    says = "^row 0: got more tokens than there is room for, expected at most its capacity of 10$"
    with pytest.raises(ValueError, match=says):
        generate(*call(*small(model.config, 3, 10)), max_tokens=5)
    with pytest.raises(ValueError, match=r"^rows 0, 2: .* capacity of 3$"):
        generate(*call(*small(model.config, 3, 3)), max_tokens=1)
    expected = generate(*call(*small(model.config, 3, 10)), max_tokens=4).tokens
    state, past = small(model.config, 3, 10)
    logits, state = prefill(model, tokens, lengths, state, past)
    steps, made = stream(model, logits, lengths, keys, state, past, max_tokens=5), []
    with pytest.raises(ValueError, match=says):
        for step in steps:
            made.append(step)
    # three generated tokens fill the row, a fourth comes out of the last of them
    np.testing.assert_array_equal(np.stack(made, axis=1), expected)


def test_wrong_calls_are_refused(tiny, past, empty, run):
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="expected at least one each"):
            pad_prompts(prompts)
    with pytest.raises(ValueError, match="max_tokens: got 0"):
        run(max_tokens=0)
    with pytest.raises(ValueError, match="chunk: got 0 tokens"):
        rows = map(jnp.asarray, pad_prompts(PROMPTS))
        prefill(tiny, *rows, empty(tiny.config, 3, SIZE), past, chunk=0)


@pytest.fixture
def optimised():
    """In full: where the real model runs, compiling costs less than what is compiled."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def test_smollm2_answers(optimised, smollm2, past, empty):
    """The answers of the weights in the file, found by two other implementations too."""
    questions = ("What is the capital of France? Answer in one sentence.", "What is gravity?")
    chats = [
        smollm2.tokenizer.encode_chat([{"role": "user", "content": question}])
        for question in questions
    ]
    tokens, lengths = map(jnp.asarray, pad_prompts(chats))
    state = empty(smollm2.config, 2, 96)
    keys = jax.random.split(jax.random.key(0), 2)
    stopped = Sampling(eos_ids=tuple(smollm2.tokenizer.eos_ids))
    options = dict(max_tokens=24, sampling=stopped)
    got = generate(smollm2.model, tokens, lengths, keys, state, past, **options)
    texts = [
        smollm2.tokenizer.decode(np.asarray(row[:count]))
        for row, count in zip(got.tokens, got.counts, strict=True)
    ]
    assert texts[0] == "The capital of France is Paris."
    assert texts[1].startswith(
        "Gravity is a fundamental concept in physics that describes the curvature of spacetime"
    )
