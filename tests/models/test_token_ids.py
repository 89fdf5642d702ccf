"""An id that the embedding has no row for is refused, at load and at every call with values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from turboquant_jax.models.checkpoint import load
from turboquant_jax.models.decoding import generate
from turboquant_jax.models.evaluate import exact_hidden
from turboquant_jax.models.generate import pad_prompts, prefill

OUTSIDE = [97, 10**6, -1, -98]


@pytest.mark.parametrize("wrong", OUTSIDE)
@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
def test_refused_with_the_id_and_its_place(tiny, past, empty, wrong, as_array):
    tokens, lengths = map(as_array, pad_prompts([[1, 2, 3], [5, wrong]]))
    keys = jax.random.split(jax.random.key(0), 2)
    with pytest.raises(ValueError, match=f"token 1 of row 1: got id {wrong}, expected 0 to 96"):
        prefill(tiny, tokens, lengths, empty(tiny.config, 2, 8), past)
    with pytest.raises(ValueError, match=f"got id {wrong}, expected 0 to 96"):
        generate(tiny, tokens, lengths, keys, empty(tiny.config, 2, 8), past, max_tokens=1)
    with pytest.raises(ValueError, match=f"got id {wrong}, expected 0 to 96"):
        exact_hidden(tiny, tokens)
    positions = jnp.zeros(tokens.shape, jnp.int32)
    with pytest.raises(ValueError, match=f"got id {wrong}, expected 0 to 96"):
        tiny(tokens, positions, empty(tiny.config, 2, 8), past.attend)


def test_the_last_id_and_what_is_padding_are_served(tiny, past, empty):
    lengths = jnp.array([3, 1], jnp.int32)
    clean = jnp.array([[1, 2, 96], [5, 0, 0]], jnp.int32)
    padded = jnp.array([[1, 2, 96], [5, -1, 10**6]], jnp.int32)
    expected, _ = prefill(tiny, clean, lengths, empty(tiny.config, 2, 8), past)
    got, _ = prefill(tiny, padded, lengths, empty(tiny.config, 2, 8), past)
    np.testing.assert_array_equal(got, expected)


def test_under_jit_nothing_is_looked_at(tiny, past, empty):
    run = jax.jit(lambda tokens: prefill(tiny, tokens, length, empty(tiny.config, 1, 8), past)[0])
    length = jnp.array([2], jnp.int32)
    assert run(jnp.array([[1, 97]], jnp.int32)).shape == (1, 97)


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(folder):
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([f"<{i}>" for i in range(2, 97)])
    backend.save(str(folder / "tokenizer.json"))
    assert load(folder).tokenizer.encode("<96>") == [96]
    backend.add_special_tokens(["<pad>"])
    backend.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"token '<pad>': got id 97, .* 97 rows") as caught:
        load(folder)
    assert str(folder / "tokenizer.json") in str(caught.value)


def test_so_is_that_of_a_gguf_file(tmp_path, tiny, gguf_tensors, write_gguf):
    tensors = gguf_tensors(tiny)
    names = ["<end>", "<s>", "</s>", *map(chr, range(33, 126)), '!"', "<more>"]
    changes = {"tokenizer.ggml.tokens": names, "tokenizer.ggml.token_type": [1] * 98}
    path = write_gguf(tmp_path / "more.gguf", tiny.config, tensors, **changes)
    with pytest.raises(ValueError, match=r"more\.gguf: token '<more>': got id 97, .* 97 rows"):
        load(path)
