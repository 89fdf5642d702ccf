"""The cache behind vLLM's pages: what a step of an engine leaves, whatever the order of steps.

Requests, pages and steps here are a scheduler's that follows vLLM's rules; attention is held
against float64 of all raw tokens.
"""

import numpy as np
import pytest

from tests.pytorch.skip import torch
from tests.pytorch.vllm_steps import (
    BLOCK,
    CPU,
    HEADS,
    PAGES,
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
from turboquant_jax.vllm import jobs, pages, slots, step, tiles


def test_attention_sees_every_token_once():
    engine = run(Engine(bits=8))
    for request, tokens in TEXTS.items():
        expected = exact(tokens)[: engine.past[request]]
        # 8 bits leave about 1 % of a vector; of a missing or doubled token the error is above 5 %
        assert relative(engine.output(request), expected) < 0.012


def test_pages_do_not_depend_on_the_steps():
    parts, whole = run(Engine(bits=4)), Engine(bits=4)
    for request, count in parts.past.items():
        whole.step(TABLES, TEXTS, {request: count})
    # page 0 is where what goes nowhere goes
    for one, other in zip(_planes(parts), _planes(whole), strict=True):
        assert torch.equal(one[:, 1:], other[:, 1:])
        assert one[:, TABLES["a"][0]].any() and one[:, TABLES["b"][2]].any()
    first = [TABLES[r][0] for r in TABLES]
    assert torch.equal(parts.layer.pages.means[0][first], whole.layer.pages.means[0][first])


def _planes(engine: Engine):
    return [rows.tensor for rows in engine.layer.pages.part.pool.rows]


def test_a_prefix_of_another_request_is_read_in_the_step_that_fills_it():
    shared = [torch.cat([x[:128], y[128:]]) for x, y in zip(TEXTS["b"], text(5, 160), strict=True)]
    texts, tables = TEXTS | {"d": shared}, TABLES | {"d": [2, 8, 15, 16]}
    engine = Engine(bits=8)
    engine.past["d"] = 128
    engine.step(tables, texts, {"d": 1, "b": 200})
    engine.step(tables, texts, {"b": 1, "d": 12})
    expected = exact(shared)[128:141]
    assert relative(engine.output("d"), expected) < 0.012


def test_kernels_do_what_the_definition_does():
    steps = ({"a": 63}, {"a": 1}, {"a": 1})
    found = [run(Engine(bits=4, kernels=kernels), steps) for kernels in (False, True)]
    one, other = (engine.output("a") for engine in found)
    assert relative(one, other) < 1e-3
    for planes in zip(*map(_planes, found), strict=True):
        kernel, written = (rows[:, TABLES["a"][0]] for rows in planes)
        # sums in another order: a coordinate on a threshold may have the neighbouring code
        assert (kernel != written).double().mean() < 0.005


def test_a_chunk_behind_a_past_reads_pages_a_tile_at_a_time(monkeypatch):
    whole = run(Engine(bits=8), ({"b": 200}, {"b": 20}))
    monkeypatch.setattr(tiles, "PAGES", 2)
    parts = run(Engine(bits=8), ({"b": 200}, {"b": 20}))
    assert relative(parts.output("b"), whole.output("b")) < 1e-5


def test_a_chunk_behind_a_past_by_the_kernels(monkeypatch):
    monkeypatch.setattr(tiles, "PAGES", 1)
    monkeypatch.setattr(jobs, "BLOCKS", 2)
    monkeypatch.setattr(step, "BLOCKS", 2)
    steps = ({"b": 130}, {"b": 3})
    found = [run(Engine(bits=4, kernels=kernels), steps) for kernels in (False, True)]
    assert relative(*(engine.output("b") for engine in found)) < 1e-3


def test_heads_of_two_processes_are_those_of_one():
    """Tensor parallelism: each process has the engine of its own heads, and the same pages."""
    whole = run(Engine(bits=4))
    for head in range(HEADS):
        queries, one = slice(2 * head, 2 * head + 2), slice(head, head + 1)
        parts = queries, one, one
        own = {
            name: [x[:, part] for x, part in zip(tokens, parts, strict=True)]
            for name, tokens in TEXTS.items()
        }
        part = run(Engine(bits=4, heads=1), texts=own)
        for name in TEXTS:
            assert relative(part.output(name), whole.output(name)[:, queries]) < 1e-5
        for one, other in zip(_planes(part), _planes(whole), strict=True):
            assert torch.equal(one[0, 1:], other[head, 1:])


@pytest.mark.parametrize("kernels", [False, True])
def test_a_captured_step_finds_the_next_ones_in_its_buffers(kernels):
    """A graph has the tensors of the step it was captured from, and is replayed for others."""
    steps = ({"a": 62, "b": 80}, *({"a": 1, "b": 1},) * 3)
    expected = run(Engine(bits=4), steps)
    engine = Engine(bits=4, kernels=kernels)
    held, make = [], engine.steps.batch

    def batch(*arguments):
        made = make(*arguments)
        held.append(made)
        return made if made.chunks else held[1]

    engine.steps.batch = batch
    run(engine, steps)  # the second single token of "a" fills a block
    for name in ("a", "b"):
        assert relative(engine.output(name), expected.output(name)) < 1e-3
    for one, other in zip(_planes(engine), _planes(expected), strict=True):
        page = TABLES["a"][0]
        assert one[:, page].any() and (one[:, page] != other[:, page]).double().mean() < 0.005


def test_slots_are_kept_while_requests_run():
    """Against a scheduler in Python that knows which request has which slot."""
    count, rng, free = 4, np.random.default_rng(7), list(range(1, PAGES))
    own, requests, waiting = slots.create(count, PAGES, CPU), {}, 0
    kept, left_out, finished = 0, 0, 0
    for _ in range(300):
        while len(requests) < count and len(free) >= 5 and rng.random() < 0.5:
            requests[waiting] = dict(pages=[free.pop(0) for _ in range(5)], past=0, slot=None)
            waiting += 1
        new = {r for r, state in requests.items() if not state["past"]}
        some = list(requests)
        if not new and len(some) > 1 and rng.random() < 0.5:  # the tokens of the step were spent
            some = some[: rng.integers(1, len(some))]
            left_out += 1
        if not some:
            continue
        step = [(r, int(rng.choice([1, 1, 1, 40, 64, 128]))) for r in some]
        lengths = torch.tensor([requests[r]["past"] for r, _ in step], dtype=torch.int32)
        seen = lengths + torch.tensor([n for _, n in step], dtype=torch.int32)
        table = torch.tensor([requests[r]["pages"] for r, _ in step], dtype=torch.int32)
        found = own.assign(table, lengths, seen, BLOCK).tolist()
        for (r, _), slot, past, end in zip(step, found, lengths, seen, strict=True):
            if past % BLOCK:
                assert slot == requests[r]["slot"]
                kept += 1
            requests[r].update(slot=slot if end % BLOCK else None, past=int(end))
        held = [state["slot"] for state in requests.values() if state["slot"] is not None]
        assert len(set(held)) == len(held) and count not in held
        for r in [r for r, state in requests.items() if state["past"] > 4 * BLOCK - 130]:
            free += requests.pop(r)["pages"]  # done, or preempted: vLLM frees the pages of both
            finished += 1
    assert min(kept, left_out, finished) > 20


def test_a_row_of_padding_has_no_slot():
    own = slots.create(2, PAGES, CPU)
    zero = torch.zeros(3, dtype=torch.int32)
    table = torch.tensor([[5], [0], [0]], dtype=torch.int32)
    seen = torch.tensor([1, 0, 0], dtype=torch.int32)
    assert own.assign(table, zero, seen, BLOCK).tolist()[1:] == [2, 2]


@pytest.mark.parametrize(("bits", "expected"), [(4, 140), (8, 268), (2, 76)])
def test_bytes_of_a_token(bits, expected):
    config = config_of(bits, dim=128)
    # codes of both vectors, two bfloat16 scales, and a page's share of a float32 mean
    assert expected == 2 * 128 * bits // 8 + 2 * 2 + 128 * 4 // BLOCK
    assert pages.token_bytes(config, codecs_of(config)) == expected


def test_other_memory_is_refused():
    config = config_of(4)
    with pytest.raises(ValueError, match=r"memory of the pages: got torch.uint8 \[3, 2, 64, 7\]"):
        pages.carve(torch.zeros(3, 2, 64, 7, dtype=torch.uint8), config, codecs_of(config))
