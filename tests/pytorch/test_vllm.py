"""The cache behind vLLM's pages: what a step of an engine leaves, whatever the order of steps.

Requests, pages and steps here are a scheduler's that follows vLLM's rules; attention is held
against float64 of all raw tokens.
"""

import sys
import types
from dataclasses import replace

import numpy as np
import pytest

from tests.pytorch.skip import torch
from turboquant_jax import vllm
from turboquant_jax.cache import CacheConfig, CodecConfig
from turboquant_jax.pytorch import codec, constants, pre_rope
from turboquant_jax.pytorch.segments import Scores
from turboquant_jax.vllm import pages, settings, slots
from turboquant_jax.vllm.step import Batch, Chunk, Layer

CPU, DIM, HEADS, GROUP, PAGES, BLOCK = torch.device("cpu"), 16, 2, 2, 24, settings.BLOCK


def config_of(bits: int, dim: int = DIM) -> CacheConfig:
    frequencies = tuple(10_000.0 ** -(np.arange(dim // 2) / (dim // 2)))
    own = CodecConfig(bits)
    return CacheConfig(
        1, HEADS, dim, own, own, window=0, sinks=0, rope_frequencies=frequencies, dtype="float32"
    )


def codecs_of(config: CacheConfig):
    (pair,) = constants.codecs_of(config, 0)
    return tuple(codec.create(own, None, None, CPU) for own in pair)


class Engine:
    """One layer, and the requests that it has."""

    def __init__(self, bits: int = 8, count: int = 4, kernels: bool = False):
        config = config_of(bits)
        codecs = codecs_of(config)
        size = pages.token_bytes(config, codecs)
        self.memory = torch.zeros(PAGES, HEADS, BLOCK, size, dtype=torch.uint8)
        held = (torch.zeros(count + 1, BLOCK, HEADS, DIM) for _ in range(2))
        own = pages.carve(self.memory, config, codecs)
        phases = pre_rope.create(config, 4096, CPU)
        self.layer = Layer(config, phases, *held, own, kernels)
        self.slots = slots.create(count, PAGES, CPU)
        self.past: dict[str, int] = {}
        self.found: dict[str, list] = {}

    def step(self, tables: dict, texts: dict, counts: dict[str, int]) -> None:
        """New tokens of some requests, single ones first, as vLLM orders them."""
        order = sorted(counts, key=lambda r: counts[r] > 1)
        past = [self.past.get(r, 0) for r in order]
        new = [counts[r] for r in order]
        start = np.cumsum([0, *new])
        table = torch.tensor([tables[r] for r in order], dtype=torch.int32)
        lengths = torch.tensor(past, dtype=torch.int32)
        seen = lengths + torch.tensor(new, dtype=torch.int32)
        chunks = tuple(
            Chunk(row, int(start[row]), n, past[row]) for row, n in enumerate(new) if n > 1
        )
        place = self.slots.assign(table, lengths, seen, BLOCK)
        batch = Batch(table, lengths, seen, place, sum(n == 1 for n in new), chunks)
        heads = (
            torch.cat([texts[r][i][p : p + n] for r, p, n in zip(order, past, new, strict=True)])
            for i in range(3)
        )
        output = self.layer.run(*heads, batch, Scores())
        for row, request in enumerate(order):
            self.found.setdefault(request, []).append(output[start[row] : start[row + 1]])
            self.past[request] = past[row] + new[row]

    def output(self, request: str) -> np.ndarray:
        return torch.cat(self.found[request]).double().numpy()


def text(seed: int, length: int):
    """Queries, keys and values; keys have a mean, as those of models do."""
    rng = np.random.default_rng(seed)
    shapes = [(length, heads, DIM) for heads in (HEADS * GROUP, HEADS, HEADS)]
    return [torch.tensor(rng.standard_normal(shape), dtype=torch.float32) for shape in shapes]


def exact(tokens) -> np.ndarray:
    q, k, v = (x.double().numpy() for x in tokens)
    k, v = (np.repeat(x, GROUP, axis=1) for x in (k, v))
    scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(DIM)
    scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("nts,snh->tnh", weights, v)


TABLES = {"a": [3, 1, 7, 9], "b": [2, 8, 4, 6], "c": [11, 12, 13, 14]}
TEXTS = {"a": text(0, 140), "b": text(1, 230), "c": text(2, 67)}
STEPS = (
    {"a": 126},
    {"a": 1, "b": 100},
    {"a": 1, "b": 100, "c": 40},
    {"c": 25},
    {"a": 1, "b": 1, "c": 1},
    {"a": 1, "b": 20, "c": 1},
)
"""Chunks that end anywhere, and single tokens, some of which complete blocks."""


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def run(engine: Engine, steps=STEPS) -> Engine:
    for counts in steps:
        engine.step(TABLES, TEXTS, counts)
    return engine


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


class Settings:
    """The part of a vLLM configuration that is looked at."""

    def __init__(self, entry=None, **changed):
        made = types.SimpleNamespace
        text = dict(
            model_type="llama", vocab_size=96, hidden_size=64, intermediate_size=96,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=DIM,
            max_position_embeddings=512, rms_norm_eps=1e-5, rope_theta=10000.0,
        )  # fmt: skip
        self.additional_config = {} if entry is None else {settings.NAME: entry}
        self.cache_config = made(block_size=changed.pop("block_size", 64), cache_dtype="auto")
        self.parallel_config = made(pipeline_parallel_size=1, decode_context_parallel_size=1)
        self.kv_transfer_config = self.speculative_config = None
        described = made(to_dict=lambda: text)
        self.model_config = made(
            hf_config=described, get_num_kv_heads=lambda parallel: 2, dtype=torch.float32
        )
        vars(self).update(changed)


def test_settings_of_an_engine():
    assert settings.cache_config(Settings()) == replace(config_of(4), block=BLOCK)
    assert settings.cache_config(Settings({"bits": 8})).key.bits == 8


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (dict(entry={"bits": 9}), "got {'bits': 9}, expected bits, one of"),
        (dict(entry={"window": 9}), "expected bits, one of"),
        (dict(block_size=16), "block_size: got 16, expected 64"),
        (dict(kv_transfer_config="some"), "kv_transfer_config: got some, expected None"),
    ],
)
def test_other_settings_are_refused(made, message):
    with pytest.raises(ValueError, match=message):
        settings.cache_config(Settings(**made))


def test_another_vllm_is_left_as_it_is(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(__version__="0.33.0"))
    vllm.register()  # whatever else it has it is not asked for
    assert "no backend for vllm 0.33.0, only for 0.26.x" in caplog.text


@pytest.mark.filterwarnings("default")
def test_metadata_of_a_mixed_step():
    """vLLM's own metadata of single tokens before chunks; runs where vLLM is installed."""
    pytest.importorskip("vllm", reason="needs vLLM 0.26")
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from turboquant_jax.vllm.backend import TurboQuantBuilder

    made = types.SimpleNamespace
    config = made(
        scheduler_config=made(max_num_seqs=4),
        cache_config=made(num_gpu_blocks=PAGES),
        parallel_config=made(decode_context_parallel_size=1),
        speculative_config=None,
    )
    builder = TurboQuantBuilder(made(), [], config, CPU)
    starts, ends = torch.tensor([0, 1, 2, 42, 242]).int(), torch.tensor([128, 70, 90, 200]).int()
    batch = builder.build(
        0,
        CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=ends,
            seq_lens_cpu_upper_bound=ends,
            num_reqs=4,
            num_actual_tokens=242,
            max_query_len=200,
            max_seq_len=200,
            block_table_tensor=torch.arange(16, dtype=torch.int32).view(4, 4),
            slot_mapping=torch.zeros(242, dtype=torch.int64),
        ),
    ).batch
    assert batch.singles == 2 and batch.completes
    assert batch.lengths.tolist() == [127, 69, 50, 0]
    assert batch.chunks == (Chunk(2, 2, 40, 50), Chunk(3, 42, 200, 0))
