"""Questions with known answers as prompts, long enough for a cache to be compressed.

- `hellaswag`: 100 cases with four endings each, after as many solved cases as fit into 512 tokens.
- `squad`: a question over paragraphs of its article, the right one among them, 2,048 tokens.
- `hotpot`: a question over its ten paragraphs and others, in random order, 4,096 tokens.
- `human_eval`, `gsm8k`: a problem with its solution after other solved ones, 2,048 tokens.

The first label of each, `case`, numbers the questions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.tasks.prompts import Prompts, chat, pack
from turboquant_jax.models.tokenizer import Tokenizer

SIZES = {"hellaswag": 512, "squad": 2048, "hotpot": 4096, "human_eval": 2048, "gsm8k": 2048}
_QUESTIONS = 64
_SOLVED = 32


def build(
    tokenizer: Tokenizer,
    *,
    hellaswag: list[dict],
    gsm8k: list[dict],
    human_eval: list[dict],
    squad: Any,
    hotpot: Any,
) -> dict[str, Prompts]:
    """Prompts by task, from the cases as their files have them."""
    problems = [(f"{p['prompt']}", p["canonical_solution"].rstrip()) for p in human_eval]
    sums = [(f"Question: {c['prompt']}\nAnswer: ", c["upstream_answer"]) for c in gsm8k]
    made = {
        "hellaswag": _hellaswag(tokenizer, hellaswag),
        "squad": _squad(tokenizer, squad["data"]),
        "hotpot": _hotpot(tokenizer, hotpot),
        "human_eval": _solved(tokenizer, problems, SIZES["human_eval"]),
        "gsm8k": _solved(tokenizer, sums, SIZES["gsm8k"]),
    }
    return {f"questions/{name}": prompts for name, prompts in made.items()}


def _examples(room: int, encoded: Sequence[list[int]]) -> list[int]:
    """As many of the examples as fit."""
    out: list[int] = []
    for ids in encoded:
        if len(out) + len(ids) > room:
            break
        out += ids
    return out


def _hellaswag(tokenizer: Tokenizer, cases: list[dict]) -> Prompts:
    rows, labels = [], []
    size = SIZES["hellaswag"]
    whole = [tokenizer.encode(f"{c['ctx']} {c['endings'][c['expected_index']]}\n\n") for c in cases]
    for number, case in enumerate(cases):
        context = tokenizer.encode(case["ctx"])
        endings = [tokenizer.encode(f" {ending}") for ending in case["endings"]]
        others = [whole[(number + i) % len(cases)] for i in range(1, len(cases))]
        shots = _examples(size - len(context) - max(map(len, endings)), others)
        for i, ending in enumerate(endings):
            rows.append((shots + context, ending))
            labels.append((number, i, i == case["expected_index"], len(case["endings"][i])))
    case_, ending_, correct, letters = np.array(labels, np.int32).T
    return pack(rows, size, case=case_, ending=ending_, correct=correct, letters=letters)


def _solved(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], size: int) -> Prompts:
    whole = [tokenizer.encode(f"{problem}{solution}\n\n") for problem, solution in pairs]
    rows, numbers = [], []
    for number, (problem, solution) in enumerate(pairs):
        context, answer = tokenizer.encode(problem), tokenizer.encode(solution)
        others = [whole[(number + i) % len(pairs)] for i in range(1, len(pairs))]
        rows.append((_examples(size - len(context) - len(answer), others) + context, answer))
        numbers.append(number)
        if len(rows) == _SOLVED:
            break
    return pack(rows, size, case=numbers)


def _chat(tokenizer: Tokenizer, documents: str, question: str, answer: str):
    text = chat(
        tokenizer,
        "Answer the question from the given documents, with as few words as "
        f"possible.\n\n{documents}\n\nQuestion: {question}",
    )
    return tokenizer.encode(f"{text}Answer:"), tokenizer.encode(f" {answer}")


def _squad(tokenizer: Tokenizer, articles: list[dict]) -> Prompts:
    rng, size = np.random.default_rng(1), SIZES["squad"]
    rows: list[tuple[list[int], list[int]]] = []
    while len(rows) < _QUESTIONS:
        article = articles[len(rows) % len(articles)]
        paragraphs = article["paragraphs"]
        which = int(rng.integers(len(paragraphs)))
        possible = [qa for qa in paragraphs[which]["qas"] if not qa["is_impossible"]]
        if not possible:
            continue
        qa = possible[int(rng.integers(len(possible)))]
        others = [p["context"] for i, p in enumerate(paragraphs) if i != which]
        documents = _mixed(tokenizer, rng, [paragraphs[which]["context"]], others, size - 200)
        rows.append(_chat(tokenizer, documents, qa["question"], qa["answers"][0]["text"]))
    return pack(rows, size, case=np.arange(len(rows)))


def _hotpot(tokenizer: Tokenizer, questions: list[dict]) -> Prompts:
    rng, size = np.random.default_rng(2), SIZES["hotpot"]
    rows: list[tuple[list[int], list[int]]] = []

    def paragraphs(question: dict) -> list[str]:
        return [f"{title}\n{''.join(sentences)}" for title, sentences in question["context"]]

    for number, question in enumerate(questions):
        if question["answer"].lower() in ("yes", "no"):
            continue
        others = [p for q in questions[number + 1 : number + 12] for p in paragraphs(q)]
        documents = _mixed(tokenizer, rng, paragraphs(question), others, size - 200)
        rows.append(_chat(tokenizer, documents, question["question"], question["answer"]))
        if len(rows) == _QUESTIONS:
            break
    return pack(rows, size, case=np.arange(len(rows)))


def _mixed(tokenizer: Tokenizer, rng, wanted: list[str], others: list[str], room: int) -> str:
    """The wanted documents and as many others as fit, in random order."""
    kept = list(wanted)
    used = sum(len(tokenizer.encode(text)) + 2 for text in wanted)
    for text in others:
        used += len(tokenizer.encode(text)) + 2
        if used > room:
            break
        kept.append(text)
    return "\n\n".join(kept[i] for i in rng.permutation(len(kept)))
