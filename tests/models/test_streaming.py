"""A stream's pieces, joined, are what decoding all tokens gives: any tokens, any tokenizer."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from turboquant_jax.models.tokenizer import Tokenizer as Ours
from turboquant_jax.models.tokenizer import byte_tokenizer

BYTES = [f"<0x{i:02X}>" for i in range(256)]
WORDS = [
    "▁",
    "▁▁",
    "▁the",
    "x",
    "é",
    "東",
    "\ufffd",
    "<0x+A>",
    "<0xG>",
    "",
    " ",
    "▁a▁",
    ".",
    "'s",
    "##s",
]
LLAMA_2 = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
SPECIAL = [AddedToken("<s>", special=True), AddedToken("</s>", special=True)]
ADDED = [AddedToken("<tool>"), AddedToken("▁plain", normalized=False)]
DECODERS = {
    "llama 2": decoders.Sequence([*LLAMA_2, decoders.Strip(" ", 1, 0)]),
    "three spaces": decoders.Sequence([*LLAMA_2, decoders.Strip(" ", 3, 0)]),
    "nested": decoders.Sequence([decoders.Sequence(LLAMA_2)]),
    "bytes alone": decoders.ByteFallback(),
    "byte level": decoders.ByteLevel(),
    "metaspace": decoders.Metaspace(),
    "word pieces": decoders.WordPiece(),
    "none": None,
    # of these the first text may change with the last token, so nothing is said before
    "end of words": decoders.BPEDecoder(suffix="x"),
    "speech": decoders.CTC(pad_token="x"),
    "replaced at last": decoders.Sequence([*LLAMA_2, decoders.Replace(Regex("x .*"), "?")]),
    "renamed bytes": decoders.Sequence([decoders.Replace("x", "<0xE6>"), *LLAMA_2]),
    "bytes of a text": decoders.Sequence([decoders.Fuse(), decoders.ByteLevel()]),
}


def tokenizer(decoder):
    """Byte tokens, the alphabet of byte-level BPE, words; special and other added tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys([*BYTES, *letters, *WORDS])
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens(ADDED)
    if decoder is not None:
        backend.decoder = decoder
    return Ours(backend, None, (), adds_bos=False, chat_template=None)


ALL = {name: tokenizer(decoder) for name, decoder in DECODERS.items()}
SIZE = ALL["none"].backend.get_vocab_size()
# Runs of bytes that make characters, or do not, among words and ids that nobody has.
CHARACTERS = st.sampled_from(["東京", "é", "🙂", "👩‍👧", "\ufffd"])
RUNS = st.one_of(
    st.integers(0, SIZE + 5).map(lambda i: [i]),
    st.integers(512, SIZE + 5).map(lambda i: [i]),
    CHARACTERS.map(lambda text: list(text.encode())),
    CHARACTERS.map(lambda text: list(text.encode()[:-1])),
)
IDS = st.lists(RUNS, max_size=12).map(lambda runs: [i for run in runs for i in run])


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@example(ids=[*"東京".encode()])
@example(ids=[*"東".encode(), 0x80])
@example(ids=[])
@given(ids=IDS)
def test_the_pieces_are_the_text(name, ids):
    pieces = list(ALL[name].stream(iter(ids)))
    assert "".join(pieces) == ALL[name].decode(ids)
    assert all(pieces)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(ids=st.lists(st.integers(0, 299), max_size=64))
def test_bytes_in_any_order(ids):
    ours = byte_tokenizer(300)
    assert "".join(ours.stream(ids)) == ours.decode(ids)


@pytest.mark.parametrize("name", ["llama 2", "byte level", "metaspace", "word pieces", "none"])
def test_what_is_final_is_said_at_once(name):
    """One piece a word; nothing of a stream is read ahead."""
    ours, said = ALL[name], []
    ids = [ours.backend.token_to_id(word) for word in ("x", "▁the", "<s>", "▁a▁", "x")]

    def feed():
        for i, token in enumerate(ids):
            yield token
            said.append((i, len(pieces)))

    pieces = []
    for piece in ours.stream(feed()):
        pieces.append(piece)
    assert said == [(0, 1), (1, 2), (2, 2), (3, 3), (4, 4)]


def test_a_run_of_bytes_is_said_when_it_ends():
    """A byte more may spoil all before it: they are decoded as a whole."""
    ours = ALL["llama 2"]
    x = ours.backend.token_to_id("x")
    assert list(ours.stream([x, *"東京".encode(), x])) == ["x", "東京x"]
    assert list(ours.stream([x, *"東京".encode(), 0x80])) == ["x", "\ufffd" * 7]
