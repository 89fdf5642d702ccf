"""Needles in a haystack, as RULER words them: a seven-digit number for a word-word key.

The haystack is essays. `single` hides one needle; `multi` hides four with different keys and asks
for one of them. The chat ends in the beginning of the answer, so that what follows is the number.
"""

import itertools

import numpy as np
from jaxtyping import Int

from experiments.tasks.prompts import Prompts, chat, pack
from turboquant_jax.models.tokenizer import Tokenizer

LENGTHS = (1024, 2048, 4096, 8192)
DEPTHS = 8
SAMPLES = {"single": 3, "multi": 2}
HIDDEN = {"single": 1, "multi": 4}
_DIGITS = 7
_FIRST = "ancient brave calm daring eager fancy gentle humble icy jolly keen lively"
_SECOND = "anchor basket candle dolphin engine feather garden harbor island jacket kettle ladder"
_KEYS = [f"{a}-{b}" for a, b in itertools.product(_FIRST.split(" "), _SECOND.split(" "))]


def build(tokenizer: Tokenizer, hay: Int[np.ndarray, " tokens"]) -> dict[str, Prompts]:
    """Prompts by task and length, every depth `SAMPLES` times."""
    rng = np.random.default_rng(0)
    return {
        f"needle/{task}/{length}": _task(tokenizer, hay, rng, task, length)
        for task in SAMPLES
        for length in LENGTHS
    }


def _task(tokenizer: Tokenizer, hay, rng, task: str, length: int) -> Prompts:
    depths = np.repeat(np.linspace(0, 1, DEPTHS), SAMPLES[task])
    rows = [_prompt(tokenizer, hay, rng, HIDDEN[task], length, depth) for depth in depths]
    return pack(rows, length, depth=depths)


def _prompt(tokenizer: Tokenizer, hay, rng, hidden: int, length: int, depth: float):
    """Context and answer."""
    keys = [_KEYS[i] for i in rng.choice(len(_KEYS), hidden, replace=False)]
    numbers = [str(n) for n in rng.integers(10 ** (_DIGITS - 1), 10**_DIGITS, hidden)]
    head, tail = chat(
        tokenizer,
        "Some special magic numbers are hidden within the following text. "
        "Make sure to memorize it. I will quiz you about the numbers afterwards.\n"
        "HAYSTACK\n"
        f"What is the special magic number for {keys[0]} mentioned in the provided text?",
    ).split("HAYSTACK")
    tail += f"The special magic number for {keys[0]} mentioned in the provided text is "
    before = tokenizer.encode(head)
    after = tokenizer.encode(tail + numbers[0])
    needles = [
        tokenizer.encode(f" One of the special magic numbers for {key} is: {number}.")
        for key, number in zip(keys, numbers, strict=True)
    ]
    room = length - len(before) - len(after) - sum(map(len, needles))
    first = int(rng.integers(0, len(hay) - room))
    straw = hay[first : first + room].tolist()
    places = [round(depth * room), *rng.integers(0, room + 1, hidden - 1).tolist()]
    for place, needle in sorted(zip(places, needles, strict=True), reverse=True):
        straw[place:place] = needle
    ids = before + straw + after
    if len(ids) != length or tokenizer.decode(ids[-_DIGITS:]) != numbers[0]:
        raise ValueError(f"a prompt of {length} tokens must end in {numbers[0]}, got {len(ids)}")
    return ids[:-_DIGITS], ids[-_DIGITS:]
