"""Steps as vLLM 0.26 gave them to our backend, when its engine generated on a CPU.

Three requests of 120 to 125 tokens, 96 tokens a step at most, 16 new tokens each; two share a first
block. They come once, once more, when their first blocks are found in the cache, and once with so
few pages that one is preempted and resumed. `texts` are all tokens of the requests.
"""

import json
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np

from tests.pytorch.skip import torch
from tests.pytorch.vllm_steps import DIM, GROUP, HEADS, Engine, exact, relative
from turboquant_jax.pytorch.segments import Scores

RECORD = json.loads(Path(__file__).with_suffix(".json").read_text())


def vectors(tokens: list[int]):
    """Queries, keys and values of a text: as in a model, by what came before each token too."""
    found, digest = [], 0
    for token in tokens:
        digest = zlib.crc32(token.to_bytes(4, "little"), digest)
        found.append(np.random.default_rng(digest).standard_normal((HEADS * (GROUP + 2), DIM)))
    whole = torch.tensor(np.stack(found), dtype=torch.float32)
    return whole.split([HEADS * GROUP, HEADS, HEADS], dim=1)


def test_attention_over_the_steps_of_the_real_engine():
    texts = {name: vectors(tokens) for name, tokens in RECORD["texts"].items()}
    expected = {name: exact(own) for name, own in texts.items()}
    pages = 1 + max(page for step in RECORD["steps"] for row in step["table"] for page in row)
    engine = Engine(bits=8, count=4, pages_held=pages)
    past: dict[str, list[int]] = {name: [] for name in texts}
    for step in RECORD["steps"]:
        starts, seen = step["starts"], step["host"]
        new = [stop - start for start, stop in pairwise(starts)]
        rows = [
            (name, end - count, end)
            for name, count, end in zip(step["requests"], new, seen, strict=True)
        ]
        table, ends, begins = (
            torch.tensor(x, dtype=torch.int32) for x in (step["table"], seen, starts)
        )
        batch = engine.steps.batch(table, ends, begins, step["singles"], starts, seen)
        q, k, v = (torch.cat([texts[r][i][begin:end] for r, begin, end in rows]) for i in range(3))
        output = engine.layer.run(q, k, v, batch, Scores())
        for (name, begin, end), start in zip(rows, starts, strict=False):
            found = output[start : start + end - begin].double().numpy()
            assert relative(found, expected[name][begin:end]) < 0.03, (name, begin)
            past[name].append(begin)
    began = [steps[0] for steps in past.values()]
    resumed = [name for name, steps in past.items() if sorted(steps) != steps]
    assert began.count(0) < len(began), "prefixes were found"
    assert resumed, "a request was preempted, and began again"
