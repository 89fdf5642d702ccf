"""How each family cuts a text into words, and whether merges tell the family."""

import pytest
from tokenizers import Tokenizer, models, trainers

from turboquant_jax.models.splitting import SPLITTINGS, splitting_named, splitting_of_merges

TEXT = "myName HTTPServer isn't 12345 x=(a);\n\n  y.\n/z  é東京"
# Read off the published patterns by hand.
WORDS = {
    "smollm": "myName| HTTPServer| isn|'t| |1|2|3|4|5| x|=(|a|);|\n\n | y|.|\n|/|z| | é東京",
    "llama-bpe": "myName| HTTPServer| isn|'t| |123|45| x|=(|a|);\n\n| | y|.\n|/z| | é東京",
    "qwen2": "myName| HTTPServer| isn|'t| |1|2|3|4|5| x|=(|a|);\n\n| | y|.\n|/z| | é東京",
    "tekken": "my|Name| HTTPServer| isn|'t| |1|2|3|4|5| x|=(|a|);\n\n| | y|.\n/|z| | é東京",
}
WORDS["smaug-bpe"] = WORDS["llama-bpe"]


@pytest.mark.parametrize("name", SPLITTINGS)
def test_words(name):
    pieces = SPLITTINGS[name].pre_tokenizer.pre_tokenize_str(TEXT)
    assert [TEXT[start:end] for _, (start, end) in pieces] == WORDS[name].split("|")


def learned(name):
    """Merges learned from words of this family."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = SPLITTINGS[name].pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=200, show_progress=False)
    backend.train_from_iterator([f"{TEXT} ({word}{word}\n  {word}" for word in "aBcDeF"], trainer)
    return [f"{token[:1]} {token[1:]}" for token in backend.get_vocab() if len(token) > 1]


@pytest.mark.parametrize("name", ["smollm", "llama-bpe", "qwen2", "tekken"])
def test_merges_tell_their_family(name):
    assert splitting_of_merges(learned(name)) == SPLITTINGS[name]


@pytest.mark.parametrize(
    ("merges", "fitting"),
    [
        (["a b", "Ġ a", "é x"], r"\['smollm', 'tekken'\]"),
        (["1 2", "12 3", "123 4"], "none served"),  # GPT-2 takes any number of digits
        (["Ċ Ġ", "a B", "( a"], "none served"),
    ],
)
def test_merges_that_tell_nothing_are_refused(merges, fitting):
    with pytest.raises(ValueError, match=f"pre: got nothing, with merges that fit {fitting}, exp"):
        splitting_of_merges(merges)


def test_a_stray_merge_in_a_thousand_is_borne():
    """Qwen2's own has "</s>", which its pattern never makes."""
    merges = [f"{sign} a{'b' * n}B" for n in range(400) for sign in "(=+-<"]
    assert splitting_of_merges([*merges, "> <s"]) == SPLITTINGS["qwen2"]
    with pytest.raises(ValueError, match="none served"):
        splitting_of_merges([*merges, "> <s", "< /s", "</s >"])  # of 2003


def test_other_names():
    assert splitting_named("deepseek-r1-qwen") is SPLITTINGS["qwen2"]
    for name in ("default", "gpt-2", 3, ["qwen2"]):
        with pytest.raises(ValueError, match=r"tokenizer\.ggml\.pre: got .*, expected one of smol"):
            splitting_named(name)
