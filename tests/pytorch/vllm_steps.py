"""A scheduler's side of our backend for vLLM: requests, pages and steps by vLLM's rules."""

import numpy as np

from tests.pytorch.skip import torch
from turboquant_jax.cache import CacheConfig, CodecConfig
from turboquant_jax.pytorch import codec, constants, pre_rope
from turboquant_jax.pytorch.segments import Scores
from turboquant_jax.vllm import pages, raw, settings
from turboquant_jax.vllm.step import Layer
from turboquant_jax.vllm.steps import Steps
from turboquant_jax.vllm.windowed import Windowed, WindowedSteps

CPU, DIM, HEADS, GROUP, PAGES, BLOCK = torch.device("cpu"), 16, 2, 2, 24, settings.BLOCK
FIRST, LAST = 24, 240
"""Pages of windows."""


def config_of(
    bits: int, dim: int = DIM, heads: int = HEADS, window: int = 0, sinks: int = 0
) -> CacheConfig:
    frequencies = tuple(10_000.0 ** -(np.arange(dim // 2) / (dim // 2)))
    own = CodecConfig(bits)
    return CacheConfig(
        1, heads, dim, own, own, window=window, sinks=sinks, rope_frequencies=frequencies,
        dtype="float32",
    )  # fmt: skip


def codecs_of(config: CacheConfig):
    (pair,) = constants.codecs_of(config, 0)
    return tuple(codec.create(own, None, None, CPU) for own in pair)


class Windows:
    """Pages of the window, by vLLM's rules: given for all new tokens, taken back behind it."""

    def __init__(self, config: CacheConfig, codecs):
        self.tokens = raw.tokens_of(config, codecs, torch.float32)
        self.kept = config.window + config.block  # the window of vLLM's spec
        self.free, self.held = list(range(FIRST, LAST)), {}

    def tables(self, order: list[str], past: list[int], seen: list[int]):
        columns = -(-len(TABLES["a"]) * BLOCK // self.tokens)
        for request, before, after in zip(order, past, seen, strict=True):
            own = self.held.setdefault(request, {})
            for column in [c for c in own if (c + 1) * self.tokens <= before - self.kept + 1]:
                self.free.append(own.pop(column))
            for column in range(before // self.tokens, -(-after // self.tokens)):
                if column not in own:
                    own[column] = self.free.pop(0)
        rows = [[self.held[r].get(c, 0) for c in range(columns)] for r in order]
        return torch.tensor(rows, dtype=torch.int32)


class Engine:
    """One layer, and the requests that it has."""

    def __init__(
        self,
        bits: int = 8,
        count: int = 4,
        kernels: bool = False,
        heads: int = HEADS,
        pages_held: int = PAGES,
        window: int = 0,
        sinks: int = 0,
    ):
        config = config_of(bits, heads=heads, window=window, sinks=sinks)
        codecs = codecs_of(config)
        size = pages.token_bytes(config, codecs)
        self.memory = torch.zeros(pages_held, heads, BLOCK, size, dtype=torch.uint8)
        own = pages.carve(self.memory, config, codecs)
        phases = pre_rope.create(config, 4096, CPU)
        self.windows = Windows(config, codecs) if window else None
        if window:
            held = (torch.zeros(count + 1, 0, heads, DIM) for _ in range(2))
            whole = raw.over(own, config, torch.float32)
            self.layer = Windowed(config, phases, *held, own, kernels, raw=whole)
            self.steps = WindowedSteps([self.layer], count, len(TABLES["a"]), CPU)
        else:
            held = (torch.zeros(count + 1, BLOCK, heads, DIM) for _ in range(2))
            self.layer = Layer(config, phases, *held, own, kernels)
            self.steps = Steps([self.layer], count, len(TABLES["a"]), CPU)
        self.past: dict[str, int] = {}
        self.found: dict[str, list] = {}

    def step(self, tables: dict, texts: dict, counts: dict[str, int]) -> None:
        """New tokens of some requests, single ones first, as vLLM orders them."""
        order = sorted(counts, key=lambda r: counts[r] > 1)
        past = [self.past.get(r, 0) for r in order]
        new = [counts[r] for r in order]
        start = np.cumsum([0, *new]).tolist()
        seen = [p + n for p, n in zip(past, new, strict=True)]
        batch = self.steps.batch(
            torch.tensor([tables[r] for r in order], dtype=torch.int32),
            torch.tensor(seen, dtype=torch.int32),
            torch.tensor(start, dtype=torch.int32),
            sum(n == 1 for n in new),
            start,
            seen,
        )
        if self.windows is not None:
            table = self.windows.tables(order, past, seen)
            batch = self.steps.with_window(batch, table, torch.tensor(seen, dtype=torch.int32))
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


def run(engine: Engine, steps=STEPS, texts: dict | None = None) -> Engine:
    for counts in steps:
        engine.step(TABLES, texts or TEXTS, counts)
    return engine
