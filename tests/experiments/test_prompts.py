"""Prompts: what is asked stands in the text where it is said to stand, and the answer ends it."""

import re
from collections import Counter

import numpy as np
import pytest

from experiments.tasks import needle_prompts, prompts, question_prompts, ruler_prompts


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


def test_what_is_traced_and_counted_stands_in_the_text(monkeypatch):
    monkeypatch.setattr(ruler_prompts, "SIZE", 5000)
    monkeypatch.setattr(ruler_prompts, "_ROOM", 700)
    text = " ".join(f"{a}{b}{c}word" for a in "abcd" for b in "efgh" for c in "ijk")
    made = ruler_prompts.build(Letters(), text)
    assert list(made) == [f"questions/{task}" for task in ruler_prompts.TASKS]
    for task, some in zip(ruler_prompts.TASKS, made.values(), strict=True):
        for row, start, count in zip(some.tokens, some.start, some.count, strict=True):
            asked = Letters().decode(row[:start])
            answer = Letters().decode(row[start : start + count])
            if task == "variables":
                links = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", asked)
                number = re.search(r"assigned the value (\d+)", asked)[1]
                assert [value for _, value in links] == [number, *(n for n, _ in links[:-1])]
                assert answer.split() == [name for name, _ in links]
                continue
            words = (asked.split("Question")[0]).split("\n", 1)[1].split()
            counted = Counter(word for word in words if word.isalpha())
            top = [word for word, _ in counted.most_common(10)]
            if task == "common":
                assert re.findall("[a-z]+", answer) == sorted(top)
                assert counted[top[-1]] > 2 * counted.most_common(11)[-1][1]
            else:
                assert answer.split() == top[:3]
