"""Generation through the compressed cache equals evaluation by teacher forcing."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from turboquant_jax import cache
from turboquant_jax.cache import Allocation, CacheConfig, CodecConfig
from turboquant_jax.models.evaluate import compare, compressed_hidden, exact_hidden
from turboquant_jax.models.generate import NO_TOKEN, compiled_prefill, decode, pad_prompts, prefill
from turboquant_jax.models.model import Llama, unstack
from turboquant_jax.models.options import Sampling
from turboquant_jax.models.past import COMPRESSED, compressed

TOKENS = 75


@pytest.fixture(scope="module")
def model(tiny_config):
    config = dataclasses.replace(tiny_config, head_dim=16, max_position=128)
    return jax.jit(lambda: Llama(config, nnx.Rngs(3), jnp.float32))()


@pytest.fixture(scope="module", params=["scalar", "trellis"])
def config(request):
    return CacheConfig(
        num_layers=3,
        num_kv_heads=2,
        head_dim=16,
        key=CodecConfig(3, code=request.param),
        value=CodecConfig(2, code=request.param),
        block=8,
        window=11,
        sinks=3,
    )


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, TOKENS), 0, 97, jnp.int32)


def test_token_by_token_equals_one_pass(model, config, tokens):
    # the two orders of summation may round a key to neighbouring bfloat16 numbers, from which the
    # search of a trellis may take another path
    config = dataclasses.replace(config, dtype="float32")
    state = cache.create(config, 2, TOKENS, key=jax.random.key(2))
    hidden = compressed_hidden(model, tokens, state)
    lengths = jnp.full(2, TOKENS, jnp.int32)
    logits, state = prefill(model, tokens, lengths, state, COMPRESSED, chunk=1)
    chex.assert_trees_all_close(model.logits(hidden)[:, -1], logits, atol=2e-5)
    np.testing.assert_array_equal(state.lengths, TOKENS)
    assert not np.any(state.overflow)
    exact = exact_hidden(model, tokens)
    assert jnp.abs(model.logits(exact)[:, -1] - logits).max() > 1e-2, "nothing was compressed"


def test_full_precision_is_a_window_that_never_lets_go(model, config, tokens):
    full = dataclasses.replace(config, window=TOKENS, dtype="float32")
    state = cache.create(full, 2, TOKENS, key=jax.random.key(2))
    assert state.table.references.size == 0
    hidden = compressed_hidden(model, tokens, state)
    exact = exact_hidden(model, tokens)
    chex.assert_trees_all_close(hidden, exact, atol=1e-5)
    same = compare(model, tokens, exact, hidden)
    np.testing.assert_allclose(same.kl, 0, atol=1e-6)
    assert same.agrees.mean() == 1
    logits = np.asarray(model.logits(exact), np.float64)[:, :-1]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(logp, np.asarray(tokens)[:, 1:, None], -1)[..., 0]
    assert same.perplexity == pytest.approx(np.exp(nll.mean()), rel=1e-5)


def test_ragged_generation_equals_each_row_alone_in_one_compilation(model, config):
    prompts = [[5, 6, 7] * 9, [11, 12]]
    sizes = []

    def run(prompts, width):
        tokens, lengths = pad_prompts(prompts)
        tokens = np.pad(tokens, ((0, 0), (0, width - tokens.shape[1])))
        state = cache.create(config, len(prompts), TOKENS, key=jax.random.key(2))
        keys = jax.random.split(jax.random.key(0), len(prompts))
        logits, state = prefill(model, tokens, lengths, state, COMPRESSED)
        made = decode(model, logits, jnp.asarray(lengths), keys, state, COMPRESSED, max_tokens=40)
        sizes.append(decode._cache_size())
        return np.asarray(made.tokens), made.state

    together, state = run(prompts, 30)
    again, _ = run([[8] * 20, [9] * 30], 30)
    assert sizes[0] == sizes[1], "another prompt compiled the generation again"
    assert not np.array_equal(together, again)
    assert np.all(together != NO_TOKEN)
    np.testing.assert_array_equal(state.lengths, [27 + 39, 2 + 39])
    for row, prompt in enumerate(prompts):
        alone, _ = run([prompt], 30)
        np.testing.assert_array_equal(alone[0], together[row])


MIXED_CONFIG = CacheConfig(3, 2, 16, CodecConfig(3), CodecConfig(2), block=8, window=11, sinks=3)


def mixed_cache(keys, values, batch=2):
    config = dataclasses.replace(MIXED_CONFIG, allocation=Allocation(keys, values))
    return cache.create(config, batch, TOKENS, key=jax.random.key(2))


def test_answers_to_one_prompt_read_it_together(model, config):
    """Three draws behind 40 tokens, whose blocks are shared, are those of three prompts."""
    tokens = np.random.default_rng(2).integers(0, model.config.vocab_size, (3, 40)).astype(np.int32)
    state = cache.create(config, 3, 60, key=jax.random.key(0))
    lengths = jnp.asarray([40, 1, 1], jnp.int32)
    logits, state = prefill(model, jnp.asarray(tokens), lengths, state, COMPRESSED)
    for row in (1, 2):
        state = cache.fork(state, 0, row)
    blocks = cache.shared_blocks(state)
    assert blocks == config.num_blocks(40) > 1
    logits, keys = jnp.tile(logits[:1], (3, 1)), jax.random.split(jax.random.key(1), 3)
    apart, together = (
        decode(
            model, logits, jnp.full(3, 40, jnp.int32), keys, jax.tree.map(jnp.copy, state), past,
            max_tokens=16, sampling=Sampling(temperature=1.0),
        )
        for past in (COMPRESSED, compressed(shared_blocks=blocks))
    )  # fmt: skip
    np.testing.assert_array_equal(together.tokens, apart.tokens)
    assert len({tuple(row) for row in np.asarray(together.tokens).tolist()}) == 3
    assert cache.shared_blocks(together.state) == blocks  # and more of their own


def test_answers_to_a_prompt_that_was_read_alone(model, config):
    """Up to the capacity, with as many pages as they then fill."""
    prompt = np.random.default_rng(2).integers(0, model.config.vocab_size, (1, 40)).astype(np.int32)
    keys = jax.random.split(jax.random.key(1), 3)

    def answers(batch, count):
        """Of as many prompts, each asked for `count` answers."""
        state = cache.create(config, batch, 60, key=jax.random.key(0))
        lengths = jnp.full(batch, 40, jnp.int32)
        tokens = jnp.asarray(np.tile(prompt, (batch, 1)))
        logits, state = prefill(model, tokens, lengths, state, COMPRESSED)
        if count > 1:
            state = cache.repeat(state, count)
        past = compressed(shared_blocks=cache.shared_blocks(state))
        return decode(
            model, jnp.repeat(logits, count, axis=0), jnp.full(3, 40, jnp.int32), keys, state, past,
            max_tokens=21, sampling=Sampling(temperature=1.0),
        )  # fmt: skip

    apart, together = answers(3, 1), answers(1, 3)
    np.testing.assert_array_equal(together.tokens, apart.tokens)
    np.testing.assert_array_equal(together.state.lengths, [60] * 3)
    assert not together.state.overflow.any()
    for state, shared in ((apart.state, 0), (together.state, config.num_blocks(40))):
        assert cache.shared_blocks(state) == shared
        pages, slots = state.table.references.shape[0], state.table.page_table.shape[1]
        assert pages == 3 * slots - 2 * shared
        assert cache.free_pages(state) == 0
    with pytest.raises(ValueError, match="sequences: got 3 to be 2, expected 1"):
        cache.repeat(apart.state, 2)


def test_bits_of_each_layer_that_are_equal_generate_what_uniform_bits_do(model):
    """Token for token and bit for bit; and bits that differ do not."""
    tokens, lengths = map(jnp.asarray, pad_prompts([[5, 6, 7] * 9, [11, 12]]))
    unstacked, drawn = unstack(model), jax.random.split(jax.random.key(0), 2)

    def run(state):
        logits, state = prefill(unstacked, tokens, lengths, state, COMPRESSED, chunk=10)
        return decode(unstacked, logits, lengths, drawn, state, COMPRESSED, max_tokens=40)

    plain = run(cache.create(MIXED_CONFIG, 2, TOKENS, key=jax.random.key(2)))
    made = run(mixed_cache((3, 3, 3), (2, 2, 2)))
    np.testing.assert_array_equal(made.tokens, plain.tokens)
    chex.assert_trees_all_equal(jax.tree.leaves(made.state), jax.tree.leaves(plain.state))
    other = run(mixed_cache((3, 1, 3), (2, 1, 2)))
    np.testing.assert_array_equal(other.state.lengths, plain.state.lengths)
    assert not np.array_equal(other.tokens, plain.tokens)


def test_a_prompt_into_an_empty_past_is_read_by_a_smaller_program(model, config, tokens):
    window = 20 if config.key.code == "trellis" else None  # both, without crossing them
    config = dataclasses.replace(config, sliding_window=window)
    windowed = dataclasses.replace(model.config, sliding_window=window)
    model = jax.jit(lambda: Llama(windowed, nnx.Rngs(3), jnp.float32))()
    lengths = jnp.asarray([TOKENS // 2, TOKENS - 3])

    def empty():
        return cache.create(config, 2, 2 * TOKENS, key=jax.random.key(2))

    def size(of_empty):
        call = model, tokens, lengths, empty(), COMPRESSED
        return len(compiled_prefill.lower(*call, empty=of_empty).as_text())

    assert size(True) < 0.85 * size(False)
    want, _ = compiled_prefill(model, tokens, lengths, empty(), COMPRESSED)
    got, state = prefill(model, tokens, lengths, empty(), COMPRESSED)
    chex.assert_trees_all_close(got, want, atol=2e-5)
    np.testing.assert_array_equal(state.lengths, lengths)
    # a second prompt sees the first, also where a row is empty
    for kept in ([TOKENS // 2, TOKENS - 3], [0, TOKENS - 3]):
        before = state.with_lengths(jnp.asarray(kept))
        again = jax.tree.map(jnp.copy, before)
        want, _ = compiled_prefill(model, tokens, lengths, before, COMPRESSED)
        got, state = prefill(model, tokens, lengths, again, COMPRESSED)
        np.testing.assert_array_equal(got, want)


def test_layers_of_the_same_bits_are_lowered_once(model):
    state = mixed_cache((3, 1, 3), (2, 1, 2))
    one, key = jnp.ones(2, jnp.int32), jax.random.split(jax.random.key(0), 2)
    logits = jnp.zeros((2, model.config.vocab_size))
    text = decode.lower(unstack(model), logits, one, key, state, COMPRESSED, max_tokens=3).as_text()
    assert text.count("func.func private @attend") == 2


def test_a_scanned_decoder_cannot_have_bits_of_each_layer(model):
    state = mixed_cache((3, 1, 3), (2, 1, 2), batch=1)
    with pytest.raises(ValueError, match="unstack the decoder"):
        prefill(model, jnp.zeros((1, 3), jnp.int32), jnp.full(1, 3, jnp.int32), state, COMPRESSED)
