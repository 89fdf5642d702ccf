"""Tokenizers of GGUF files: byte-level merges and SentencePiece's BPE, and what is refused."""

import itertools

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from turboquant_jax.models.gguf_tokenizer import tokenizer_from_gguf


def gguf_metadata(**changes):
    letters = [chr(c) for c in range(33, 127)]
    tokens = ["<eos>", *letters, "Ġ", "Ċ", "12", "34", "123", "ab", "<user>", "<|bos|>"]
    types = [3] + [1] * (len(tokens) - 3) + [4, 3]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["1 2", "3 4", "12 3"],
        "tokenizer.ggml.bos_token_id": len(tokens) - 1,
    } | changes


def test_llama_3_splits_three_digits_and_starts_with_bos():
    tokenizer = tokenizer_from_gguf(gguf_metadata(), (0,))
    pieces = [tokenizer.backend.id_to_token(i) for i in tokenizer.encode("12341 ab<user>")]
    # "ab" has no merge: a whole word in the vocabulary is taken as it is
    assert pieces == ["<|bos|>", "123", "4", "1", "Ġ", "a", "b", "<user>"]
    assert tokenizer.backend.encode("ab").tokens == ["ab"]
    assert tokenizer.decode(tokenizer.encode("12341 ab<user>")) == "12341 ab<user>"


def test_a_file_that_names_no_pre_tokenizer():
    """Three digits are one token: no other family has that."""
    named = tokenizer_from_gguf(gguf_metadata(), (0,))
    unnamed = tokenizer_from_gguf(gguf_metadata(**{"tokenizer.ggml.pre": None}), (0,))
    assert unnamed.backend.to_str() == named.backend.to_str()
    assert unnamed.adds_bos


def test_smollm_splits_every_digit_and_starts_as_asked():
    metadata = gguf_metadata(**{"tokenizer.ggml.pre": "smollm"})
    tokenizer = tokenizer_from_gguf(metadata, (0,))
    assert [tokenizer.backend.id_to_token(i) for i in tokenizer.encode("123")] == ["1", "2", "3"]
    metadata["tokenizer.ggml.add_bos_token"] = True
    assert tokenizer_from_gguf(metadata, (0,)).encode("1")[0] == tokenizer.bos_id


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "model: got 'bert', expected 'gpt2' or 'llama'"),
        ({"tokenizer.ggml.pre": "default"}, "pre: got 'default', expected one of smollm, llama"),
        ({"tokenizer.ggml.pre": None, "tokenizer.ggml.merges": ["a b"]}, "pre: got nothing, with"),
        ({"tokenizer.ggml.tokens": None}, "tokens: got None, expected a list of str"),
        ({"tokenizer.ggml.merges": None}, "merges: got None, expected a list of str"),
        ({"tokenizer.ggml.merges": [1]}, "merges: got a list, expected a list of str"),
        ({"tokenizer.ggml.merges": ["1 2 3"]}, "expected merges of two known tokens"),
        ({"tokenizer.ggml.merges": ["1 é"]}, "expected merges of two known tokens"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "got 103 tokens with 2 types"),
    ],
)
def test_gguf_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_from_gguf(gguf_metadata(**changes), (0,))


def test_qwen_2_composes_accents_and_needs_no_start():
    tokens = [*gguf_metadata()["tokenizer.ggml.tokens"], "Ã", "©", "e", "Ì", "ģ"]
    metadata = gguf_metadata() | {
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(tokens),
    }
    tokenizer = tokenizer_from_gguf(metadata, (0,))
    assert [tokens[i] for i in tokenizer.encode("e\u0301 12")] == ["Ã", "©", "Ġ", "1", "2"]
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "\u00e9"
    metadata["tokenizer.ggml.pre"] = "smaug-bpe"
    plain = tokenizer_from_gguf(metadata, (0,))
    assert plain.decode(plain.encode("e\u0301 12")) == "e\u0301 12"
    assert [tokens[i] for i in plain.encode("12 ab")] == ["12", "Ġ", "a", "b"]


def test_tekken_takes_whole_words_and_starts_with_bos():
    tokenizer = tokenizer_from_gguf(gguf_metadata(**{"tokenizer.ggml.pre": "tekken"}), (0,))
    pieces = [tokenizer.backend.id_to_token(i) for i in tokenizer.encode("ab")]
    assert pieces == ["<|bos|>", "ab"]


SENTENCES = [
    "the cat sat on the mat; the other cat sat there.",
    "a rather long tale: there, then, and than another.",
    "banana bandana cabana, 1234 and 12 and 341.",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@pytest.fixture(scope="module")
def sentencepiece():
    """Metadata as converted from a model that SentencePiece has learned: scores fall by 1."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=120, show_progress=False)
    backend.train_from_iterator(SENTENCES, trainer)
    vocabulary = backend.get_vocab()
    learned = sorted(vocabulary, key=lambda t: (len(t) == 1, vocabulary[t]))  # letters at the end
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *learned, "<user>", "[INST]"]
    scores = [0.0] * 259 + [-float(i) for i in range(len(learned))] + [0.0] * 2
    types = [2, 3, 3] + [6] * 256 + [1] * len(learned) + [4, 3]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def by_score(metadata, text):
    """llama.cpp's rule: neighbours that make the best token join first, of equals the leftmost."""
    score = dict(
        zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], strict=True)
    )
    symbols = list(text.replace(" ", "\u2581"))
    while True:
        pairs = [
            (-score[a + b], i)
            for i, (a, b) in enumerate(itertools.pairwise(symbols))
            if a + b in score
        ]
        if not pairs:
            break
        at = min(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    pieces = []
    for symbol in symbols:
        pieces += [symbol] if symbol in score else [f"<0x{b:02X}>" for b in symbol.encode()]
    return pieces


TEXTS = [
    "the other cat",
    " there  then\n",
    "bananabandana 12341",
    "naïve 東京 🙂 xyz",
    "aaaa tttthe",
]


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_joins_the_best_neighbours(sentencepiece, text):
    tokenizer = tokenizer_from_gguf(sentencepiece, (2,))
    tokens, ids = sentencepiece["tokenizer.ggml.tokens"], tokenizer.encode(text)
    assert [tokens[i] for i in ids] == ["<s>", *by_score(sentencepiece, " " + text)]
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.stream(ids)) == text


def test_sentencepiece_puts_a_space_in_front_of_every_text(sentencepiece):
    """Of one after a special token too, as llama.cpp does; none where the file says so."""
    tokens = sentencepiece["tokenizer.ggml.tokens"]

    def pieces(text, **changes):
        tokenizer = tokenizer_from_gguf(sentencepiece | changes, (2,))
        ids = tokenizer.encode(text)
        return [tokens[i] for i in ids], tokenizer.decode(ids)

    joined = ["<s>", *by_score(sentencepiece, " cat"), "[INST]", *by_score(sentencepiece, "  cat")]
    assert pieces("cat[INST] cat") == (joined, "cat  cat")
    joined = ["<s>", *by_score(sentencepiece, " cat"), "<user>", *by_score(sentencepiece, " cat")]
    assert pieces("cat<user>cat") == (joined, "cat<user> cat")
    bare = by_score(sentencepiece, "cat")
    off = {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    assert pieces("cat[INST]cat", **off) == ([*bare, "[INST]", *bare], "catcat")
    assert pieces("") == (["<s>"], "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.scores": None}, "scores: got None, expected a list of float"),
        ({"tokenizer.ggml.scores": [1.0]}, "scores: got .*, expected a number for each token"),
        ({"tokenizer.ggml.remove_extra_whitespaces": True}, "remove_extra_whitespaces: got True"),
    ],
)
def test_sentencepiece_refusals(sentencepiece, changes, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_from_gguf(sentencepiece | changes, (2,))


def test_sentencepiece_needs_bytes_or_an_unknown_token(sentencepiece):
    """Without either, what has no token would vanish."""
    types = sentencepiece["tokenizer.ggml.token_type"]
    known = {"tokenizer.ggml.token_type": [1 if kind == 2 else kind for kind in types]}
    assert tokenizer_from_gguf(sentencepiece | known, (2,)).decode([2]) == ""
    tokens = ["?" if t == "<0x0A>" else t for t in sentencepiece["tokenizer.ggml.tokens"]]
    with pytest.raises(ValueError, match="neither an unknown token nor every byte"):
        tokenizer_from_gguf(sentencepiece | known | {"tokenizer.ggml.tokens": tokens}, (2,))
    unknown = sentencepiece | {"tokenizer.ggml.tokens": tokens}
    assert tokenizer_from_gguf(unknown, (2,)).encode("\n")[-1] == 0
