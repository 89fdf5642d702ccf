"""RULER's tasks of tracing and counting, in its words (arXiv:2404.06654) but without the solved
example that it puts before them, 2,048 tokens.

- `variables`: a chain of five names that get one number from each other, hidden in noise; which
  names have it, in the order of the chain.
- `common`: a numbered list with ten words of 30 copies and others of 3, as much of it as fits;
  which ten, the alphabet's first one first.
- `frequent`: coded words of a Zeta distribution; the three most frequent, the most frequent first.

The order of the answer's words is free in RULER. Teacher-forced, it is the one that is named here.
The first label, `case`, numbers the prompts.
"""

import re

import numpy as np

from experiments.tasks.prompts import Prompts, chat, pack
from turboquant_jax.models.tokenizer import Tokenizer

TASKS = ("variables", "common", "frequent")
SIZE = 2048
_CASES = 32
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_WORDS = re.compile(r"\b[a-z]{5,9}\b")
_ROOM = 160  # tokens of a question and its answer, at most


def build(tokenizer: Tokenizer, text: str) -> dict[str, Prompts]:
    """Prompts by task; the words of `common` are those of a text."""
    rng, words = np.random.default_rng(4), sorted(set(_WORDS.findall(text)))
    makers = dict(zip(TASKS, (_variables, _common, _frequent), strict=True))
    made = {}
    for name, make in makers.items():
        rows = []
        for _ in range(_CASES):
            request, begin, answer = make(tokenizer, rng, words)
            asked = tokenizer.encode(chat(tokenizer, request) + begin)
            rows.append((asked, tokenizer.encode(f" {answer}")))
        made[f"questions/{name}"] = pack(rows, SIZE, case=np.arange(_CASES))
    return made


def _fit(tokenizer: Tokenizer, parts: list[str], join: str) -> list[str]:
    """The first of the parts that have room."""
    room, kept = SIZE - _ROOM, 0
    for part in parts:
        room -= len(tokenizer.encode(join + part))
        if room < 0:
            break
        kept += 1
    return parts[:kept]


def _variables(tokenizer: Tokenizer, rng: np.random.Generator, words: list[str]):
    number, letters = int(rng.integers(10_000, 100_000)), [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    names = ["".join(rng.choice(letters, 5)) for _ in range(5)]
    values = [str(number), *(f"VAR {name}" for name in names[:-1])]
    chain = [f"VAR {name} = {value}" for name, value in zip(names, values, strict=True)]
    room = len(tokenizer.encode("\n".join(chain)))
    lines = _fit(tokenizer, [_NOISE] * SIZE, "\n")
    lines = lines[: len(lines) - -(-room // len(tokenizer.encode("\n" + _NOISE)))]
    places = np.sort(rng.integers(0, len(lines) + 1, 5)).tolist()
    for place, link in reversed([*zip(places, chain, strict=True)]):
        lines.insert(place, link)
    request = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        + "\n".join(lines)
        + f"\nQuestion: Find all variables that are assigned the value {number} in the text above."
    )
    begin = (
        "Answer: According to the chain(s) of variable assignment in the text above, 5 variables "
        f"are assigned the value {number}, they are:"
    )
    return request, begin, " ".join(names)


def _common(tokenizer: Tokenizer, rng: np.random.Generator, words: list[str]):
    drawn = rng.permutation(words).tolist()
    common = drawn[:10]
    listed = [*np.repeat(common, 30), *np.repeat(drawn[10:30], 3)]
    kept = _fit(tokenizer, [f"999. {word}" for word in rng.permutation(listed)], " ")
    text = " ".join(f"{i + 1}. {line.split()[1]}" for i, line in enumerate(kept))
    request = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        f"Memorize the ones that appear most often.\n{text}\nQuestion: What are the 10 most common "
        "words in the above list?"
    )
    begin = "Answer: The top 10 words that appear most often in the list are:"
    return request, begin, " ".join(f"{i + 1}. {word}" for i, word in enumerate(sorted(common)))


def _frequent(tokenizer: Tokenizer, rng: np.random.Generator, words: list[str]):
    coded = ["".join(rng.choice([*"abcdefghijklmnopqrstuvwxyz"], 6)) for _ in range(40)]
    shares = np.arange(1, 41) ** -2.0
    order = rng.choice(40, SIZE, p=shares / shares.sum())
    kept = _fit(tokenizer, [coded[i] for i in order], " ")
    count = sorted(set(kept), key=lambda word: -kept.count(word))
    request = (
        "Read the following coded text and track the frequency of each coded word. Find the three "
        f"most frequently appeared coded words.\n{' '.join(kept)}\nQuestion: What are the three "
        "most frequently appeared words in the above coded text?"
    )
    begin = "Answer: According to the coded text above, the three most frequently appeared words "
    begin += "are:"
    return request, begin, " ".join(count[:3])
