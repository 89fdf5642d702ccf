"""The cache behind vLLM's pages with a window and sinks in full precision, in pages of their own.

As in `test_vllm`: a scheduler that follows vLLM's rules, and attention in float64 of raw tokens.
"""

import numpy as np
import pytest

from tests.pytorch.skip import torch
from tests.pytorch.vllm_steps import (
    BLOCK,
    LAST,
    TABLES,
    TEXTS,
    Engine,
    codecs_of,
    config_of,
    exact,
    relative,
    run,
    text,
)  # fmt: skip
from turboquant_jax.pytorch import pre_rope
from turboquant_jax.vllm import raw

SINGLE = ({"b": 190}, *({"b": 1},) * 9)
"""With four sinks the block that begins at 132 is full at 196, and behind a window of 64."""


def engine(bits: int = 8, window: int = 64, sinks: int = 4, **other) -> Engine:
    return Engine(bits=bits, window=window, sinks=sinks, pages_held=LAST, **other)


def test_within_the_window_attention_is_exact():
    found = run(engine(bits=2, window=192))
    for request, tokens in TEXTS.items():
        expected = exact(tokens)[: found.past[request]]
        assert relative(found.output(request), expected) < 1e-6


@pytest.mark.parametrize(("window", "sinks"), [(64, 4), (128, 0)])
def test_behind_the_window_every_token_is_seen_once(window, sinks):
    for steps in (({"b": 100}, {"b": 100}, *({"b": 1},) * 5), SINGLE):
        found = run(engine(window=window, sinks=sinks), steps)
        expected = exact(TEXTS["b"])[: found.past["b"]]
        assert relative(found.output("b"), expected) < 0.004


def test_codes_are_seen_behind_the_window_only():
    """A defect in a page shows from the token on whose window has left its block."""
    outputs = []
    for spoilt in (False, True):
        found = run(engine(), SINGLE[:1])
        if spoilt:
            first = found.layer.pages.part.pool.values[0][0].tensor
            first[:, TABLES["b"][1]] = 0  # the block of tokens 4 to 67, behind its sinks' page
            first[:, TABLES["b"][2]] = 0  # and of 68 to 131
        run(found, SINGLE[1:])
        outputs.append(found.output("b"))
    changed = np.abs(outputs[0] - outputs[1]).max(axis=(1, 2)) > 0
    assert changed[190:].all() and not changed[:190].any()
    found = run(engine(window=128), SINGLE[:1])
    found.layer.pages.part.pool.values[0][0].tensor[:, TABLES["b"][2]] = 0
    run(found, SINGLE[1:])
    whole = run(engine(window=128), SINGLE)
    assert np.array_equal(found.output("b"), whole.output("b"))  # 128 + 68 tokens are not there yet


def test_sinks_are_exact_in_the_first_page():
    found = run(engine(bits=2), SINGLE)
    own, page = found.layer.raw, TABLES["b"][0]
    for held, tokens in zip((own.keys, own.values), TEXTS["b"][1:], strict=True):
        pages = held.view(2, LAST, own.tokens, -1)
        assert torch.equal(pages[:, page, :4].transpose(0, 1), tokens[:4])


def test_pages_do_not_depend_on_the_steps():
    parts, whole = run(engine(bits=4)), engine(bits=4)
    for request, count in parts.past.items():
        whole.step(TABLES, TEXTS, {request: count})
    for one, other in zip(*(e.layer.pages.part.pool.rows for e in (parts, whole)), strict=True):
        pages = [TABLES["a"][1], TABLES["b"][1], TABLES["b"][2]]
        assert torch.equal(one.tensor[:, pages], other.tensor[:, pages])
        assert one.tensor[:, pages].any()
    first = [TABLES["a"][1], TABLES["b"][1]]
    mean = parts.layer.pages.means[0][first]
    assert torch.equal(mean, whole.layer.pages.means[0][first])
    expected = pre_rope.mean_key(TEXTS["b"][1][None, 4 : 4 + BLOCK], parts.layer.phases)
    assert torch.allclose(mean[1], expected[0], atol=1e-5)


def test_a_prefix_of_another_request_is_read_in_the_step_that_fills_it():
    shared = [torch.cat([x[:128], y[128:]]) for x, y in zip(TEXTS["b"], text(5, 160), strict=True)]
    texts, tables = TEXTS | {"d": shared}, TABLES | {"d": [2, 8, 15, 16]}
    found = engine()
    found.windows.tables(["b"], [0], [200])
    found.windows.held["d"] = {
        column: page
        for column, page in found.windows.held["b"].items()
        if column < 128 // found.windows.tokens
    }
    found.past["d"] = 128
    found.step(tables, texts, {"d": 1, "b": 200})
    found.step(tables, texts, {"b": 1, "d": 12})
    assert relative(found.output("d"), exact(shared)[128:141]) < 0.004


def test_kernels_do_what_the_definition_does():
    steps = ({"b": 194}, *({"b": 1},) * 3)
    one, other = (run(engine(bits=4, kernels=kernels), steps) for kernels in (False, True))
    assert relative(one.output("b"), other.output("b")) < 1e-3
    page = TABLES["b"][3]  # of the block that a single token fills
    for planes in zip(*(e.layer.pages.part.pool.rows for e in (one, other)), strict=True):
        kernel, written = (rows.tensor[:, page] for rows in planes)
        assert kernel.any() and (kernel != written).double().mean() < 0.005


def test_a_captured_step_finds_the_next_ones_in_its_buffers():
    steps = ({"a": 62, "b": 193}, *({"a": 1, "b": 1},) * 5)
    expected = run(engine(bits=4), steps)
    found = engine(bits=4)
    held, make = [], found.steps.with_window

    def with_window(*arguments):
        made = make(*arguments)
        held.append(made)
        return made if made.chunks else held[1]

    found.steps.with_window = with_window
    run(found, steps)  # "b" fills a block with its third single token
    for name in ("a", "b"):
        assert relative(found.output(name), expected.output(name)) < 1e-6
    for one, other in zip(*(e.layer.pages.part.pool.rows for e in (found, expected)), strict=True):
        page = TABLES["b"][3]
        assert one.tensor[:, page].any() and torch.equal(one.tensor[:, page], other.tensor[:, page])


@pytest.mark.parametrize(("bits", "expected"), [(2, 8), (3, 8), (4, 16), (5, 16), (8, 32)])
def test_tokens_of_a_raw_page(bits, expected):
    config = config_of(bits, dim=128)
    codecs = codecs_of(config)
    assert raw.tokens_of(config, codecs, torch.bfloat16) == expected
    assert raw.tokens_of(config, codecs, torch.float32) == expected // 2
