"""Tokenizers: round trips, streams, chats and refusals; those of folders."""

import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors

from turboquant_jax.models.tokenizer import tokenizer_from_folder

TEXTS = [
    "",
    "Hello, world!",
    "  leading and trailing  \n\n\ttabs\r\n",
    "1842 + 17 = 1859; don't, they'll, WE'VE",
    "naïve café, Straße, 東京, Ωμέγα, 🙂👩‍👩‍👧, \u200bzero width",
]


@pytest.fixture
def tokenizer(smollm2):
    return smollm2.tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_known_ids(tokenizer):
    """Digits one by one and the ChatML tokens, as the released tokenizer has them."""
    pieces = [tokenizer.backend.id_to_token(i) for i in tokenizer.encode("in 1842 or so")]
    assert pieces == ["in", "Ġ", "1", "8", "4", "2", "Ġor", "Ġso"]
    assert tokenizer.encode("<|im_start|>user<|im_end|>") == [1, 4093, 2]
    assert tokenizer.eos_ids == (2,)
    assert tokenizer.decode([1, 4093, 2]) == "user"


def test_a_stream_never_splits_a_character(tokenizer):
    text = "café 🙂👩‍👩‍👧 東京 done"
    ids = tokenizer.encode(text)
    pieces = list(tokenizer.stream(iter([1, *ids, 2])))
    assert "".join(pieces) == text
    assert len(pieces) > 3
    assert not any("\ufffd" in piece for piece in pieces)


def test_chat_template(tokenizer):
    messages = [{"role": "user", "content": "What is gravity?"}]
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    expected = (
        f"<|im_start|>system\n{system}<|im_end|>\n"
        "<|im_start|>user\nWhat is gravity?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer.apply_chat(messages) == expected
    ids = tokenizer.encode_chat(messages)
    assert (ids[0], ids.count(1), ids.count(2)) == (1, 3, 2)
    own = [{"role": "system", "content": "Be brief."}, *messages]
    assert tokenizer.apply_chat(own).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")


@pytest.fixture
def folder(tmp_path):
    backend = Backend(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "?": 4}, "?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_folder(folder):
    tokenizer = tokenizer_from_folder(folder, 0, (1,))
    assert tokenizer.encode("a b") == [2, 3]
    assert tokenizer.decode([0, 2, 3, 1]) == "a b"
    assert tokenizer.chat_template is None
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    backend.save(str(folder / "tokenizer.json"))
    assert tokenizer_from_folder(folder, 0, (1,)).encode("a b") == [0, 2, 3]


def test_folder_refusals(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: got .*, expected a tokenizer\.json"):
        tokenizer_from_folder(folder, 0, (1,))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: no such file"):
        tokenizer_from_folder(folder, 0, (1,))


@pytest.fixture
def changed(folder):
    """`changed(**parts)`: the tokenizer of the folder, parts of its file replaced."""

    def load(**parts):
        path = folder / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | parts))
        return tokenizer_from_folder(folder, 0, (1,))

    return load


def test_a_tokenizer_that_panics_is_refused(changed):
    """The panic of the package is a BaseException, which no `except Exception` sees."""
    ours = changed(decoder={"type": "Strip", "content": "a", "start": 0, "stop": 3})
    with pytest.raises(BaseException) as caught:
        ours.backend.decode([2])
    assert not isinstance(caught.value, Exception)
    with pytest.raises(ValueError, match=r"tokenizer: got .*, expected one that serves this"):
        ours.decode([2])
    with pytest.raises(ValueError, match=r"tokenizer: got .*, expected one that serves this"):
        list(ours.stream([2]))


def test_a_tokenizer_that_panics_at_its_first_use_is_refused_at_load(changed):
    """A template of special tokens that names one which it does not have."""
    single = [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    template = {"type": "TemplateProcessing", "single": single, "pair": single}
    with pytest.raises(ValueError, match=r"tokenizer\.json: got .*, expected a tokenizer\.json"):
        changed(post_processor=template | {"special_tokens": {}})


def test_a_tokenizer_without_a_token_for_a_text_is_refused(changed):
    model = {"type": "WordLevel", "vocab": {"a": 2}, "unk_token": "gone"}
    ours = changed(model=model)
    assert ours.encode("a") == [2]
    with pytest.raises(ValueError, match="tokenizer: got WordLevel error: Missing"):
        ours.encode("zebra")


def test_nothing_is_cut_or_padded(changed):
    """As in transformers: what `tokenizer.json` says of it is for batches of training."""
    cut = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    pad |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"}
    assert changed(truncation=cut, padding=pad).encode("a b a") == [2, 3, 2]
