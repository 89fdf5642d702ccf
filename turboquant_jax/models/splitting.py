"""How byte-level vocabularies cut a text into words before any merge: `tokenizer.ggml.pre`.

The names and what goes with them are llama.cpp's (`src/llama-vocab.cpp`), the patterns those of the
`tokenizer.json` that each family was published with.
"""

import dataclasses
import itertools
from collections.abc import Iterable

from tokenizers import Regex, normalizers, pre_tokenizers

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
# A word begins at a capital letter.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_LLAMA_3 = rf"{_CONTRACTIONS}{_LETTERS}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_QWEN_2 = rf"{_CONTRACTIONS}{_LETTERS}|\p{{N}}|{_SIGNS}|{_SPACES}"
_TEKKEN = rf"{_CASED}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


@dataclasses.dataclass(frozen=True)
class Splitting:
    """What a family does to a text before its merges.

    Attributes:
      pattern: one match a word; None for GPT-2's own, after every digit stands alone.
      whole_words: a word that is in the vocabulary is taken as it is, whatever the merges say.
      adds_bos: a text begins with the start token where the file does not say.
      composes: letters and their accents become one character first (Unicode NFC).
    """

    pattern: str | None
    whole_words: bool = False
    adds_bos: bool = False
    composes: bool = False

    @property
    def normalizer(self) -> normalizers.Normalizer | None:
        """What changes the text itself."""
        return normalizers.NFC() if self.composes else None

    @property
    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """Text to words, in the letters that stand for bytes."""
        first = (
            pre_tokenizers.Digits(individual_digits=True)
            if self.pattern is None
            else pre_tokenizers.Split(Regex(self.pattern), behavior="isolated")
        )
        own = self.pattern is None
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own)
        return pre_tokenizers.Sequence([first, byte_level])


SPLITTINGS = {
    "smollm": Splitting(None),
    "llama-bpe": Splitting(_LLAMA_3, whole_words=True, adds_bos=True),
    "smaug-bpe": Splitting(_LLAMA_3),
    "qwen2": Splitting(_QWEN_2, composes=True),
    "tekken": Splitting(_TEKKEN, whole_words=True, adds_bos=True),
}
"""Name of a pre-tokenizer in GGUF -> what it does."""

_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}

_FINER_FIRST = (("smollm",), ("tekken", "qwen2", "llama-bpe"))

# Of the merges of a vocabulary, those that its own pattern would never make. Measured on merges in
# ASCII: Qwen2's own 4 of 94,230, SmolLM2's own none; of another family at least 117 of 48,109.
_STRAY = 1e-3


def splitting_named(name: object) -> Splitting:
    """ValueError for a name that is not served."""
    names = {n: n for n in SPLITTINGS} | _ALIASES
    if not isinstance(name, str) or name not in names:
        raise ValueError(f"tokenizer.ggml.pre: got {name!r}, expected one of {', '.join(names)}")
    return SPLITTINGS[names[name]]


def splitting_of_merges(merges: Iterable[str]) -> Splitting:
    """The splitting that merges were learned under, for old files that do not name it.

    Learning never joins what the pattern cuts, so under the right one every merged token is one
    word; merges in ASCII are looked at, since some vocabularies were learned with another rule for
    accents than they are used with. Of patterns that cut finer and finer the finest that fits is
    taken: no merge reaches across its cuts, so the others would give the same tokens.
    Raises ValueError where no family fits, or families that do not refine one another.
    """
    letters = {chr(b): chr(b) for b in range(33, 127)} | {"Ġ": " ", "Ċ": "\n", "č": "\r", "ĉ": "\t"}
    joined = [merge.replace(" ", "") for merge in merges]
    texts = ["".join(letters[c] for c in token) for token in joined if letters.keys() >= set(token)]
    finest = (next((n for n in chain if _fits(n, texts)), None) for chain in _FINER_FIRST)
    fitting = [name for name in finest if name is not None]
    if len(fitting) != 1:
        raise ValueError(
            f"tokenizer.ggml.pre: got nothing, with merges that fit {fitting or 'none served'}, "
            f"expected one of {', '.join(SPLITTINGS)}, or merges that fit one alone"
        )
    return SPLITTINGS[fitting[0]]


def _fits(name: str, texts: list[str]) -> bool:
    split = SPLITTINGS[name].pre_tokenizer.pre_tokenize_str
    stray = (text for text in texts if len(split(text)) != 1)
    one_too_many = itertools.islice(stray, int(_STRAY * len(texts)), None)
    return next(one_too_many, None) is None
