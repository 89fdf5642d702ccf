"""Prompts: what is asked stands in the text where it is said to stand, and the answer ends it."""

import re

import numpy as np
import pytest

from experiments.tasks import needle_prompts, prompts, question_prompts


class Letters:
    """A tokenizer of one token a letter."""

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def apply_chat(self, messages):
        return f"<{messages[0]['content']}>"


def test_needles_stand_at_their_depth(monkeypatch):
    monkeypatch.setattr(needle_prompts, "LENGTHS", (1500,))
    hay = np.full(5000, ord("~"), np.int32)
    made = needle_prompts.build(Letters(), hay)
    assert set(made) == {"needle/single/1500", "needle/multi/1500"}
    for name, needles in made.items():
        hidden = needle_prompts.HIDDEN[name.split("/")[1]]
        for row, start, depth in zip(needles.tokens, needles.start, needles.labels["depth"]):
            text, answer = Letters().decode(row[:start]), Letters().decode(row[start:])
            asked = re.search(r"number for (\S+) mentioned in the provided text is $", text)[1]
            found = dict(re.findall(r"numbers for (\S+) is: (\d{7})\.", text))
            assert len(found) == hidden and found[asked] == answer
            straw = text.index("~"), text.rindex("~")
            place = (text.index(f"numbers for {asked}") - straw[0]) / (straw[1] - straw[0])
            assert abs(place - depth) < 0.15
        assert len(needles.tokens) == 8 * needle_prompts.SAMPLES[name.split("/")[1]]


def test_questions_end_in_their_answers():
    case = {"ctx": "a cat", "endings": ["sat.", "ran away."], "expected_index": 1}
    article = {
        "paragraphs": [
            {
                "context": "Rome is old. " * 8,
                "qas": [
                    {"question": "What is old?", "answers": [{"text": "Rome"}], "is_impossible": 0}
                ],
            },
            {"context": "x" * 3000, "qas": []},
        ]
    }
    hotpot = {"question": "Who?", "answer": "Eve", "context": [["Title", ["One. ", "Two."]]]}
    made = question_prompts.build(
        Letters(),
        hellaswag=[case] * 3,
        gsm8k=[{"prompt": "1 + 1?", "upstream_answer": "2"}] * 3,
        human_eval=[{"prompt": "def f():", "canonical_solution": "  pass\n"}] * 3,
        squad={"data": [article]},
        hotpot=[hotpot] * 3,
    )
    ends = {
        name.split("/")[1]: {
            Letters().decode(row[start - 7 : start + count])
            for row, start, count in zip(p.tokens, p.start, p.count)
        }
        for name, p in made.items()
    }
    assert ends == {
        "hellaswag": {"\n\na cat sat.", "\n\na cat ran away."},
        "squad": {"Answer: Rome"},
        "hotpot": {"Answer: Eve"},
        "human_eval": {"ef f():  pass"},
        "gsm8k": {"nswer: 2"},
    }
    hellaswag = made["questions/hellaswag"].labels
    assert hellaswag["correct"].tolist() == [0, 1] * 3
    assert hellaswag["letters"].tolist() == [4, 9] * 3


def test_a_prompt_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="has 9 tokens, expected at most 8"):
        prompts.pack([([1] * 5, [2] * 4)], 8)
