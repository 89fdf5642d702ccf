"""Golden digests of caches: what the code stored and attended to when `golden.json` was written.

    python -m tests.golden            # compare all of them: several minutes
    python -m tests.golden --write    # after a change of format that was meant

Tests compare a few settings, each in one way: `IN_TESTS`.

Each setting goes through one scenario, twice: its tokens come in chunks, and one by one. Chunks are
ragged, rows are forked and freed in between, and a last token is attended to and written layer by
layer. SHA-256 digests are of every stored array; attention's outputs are kept as numbers.
"""

import hashlib
import json
import platform
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.layout import calibration
from turboquant_jax import cache
from turboquant_jax.attention import PLAIN, Scores, attend_and_write
from turboquant_jax.cache import CacheConfig, CodecConfig

FILE = Path(__file__).with_name("golden.json")
QUICK = {"xla_backend_optimization_level": 0}  # to compile
BATCH, GROUP = 3, 2  # sequences, query heads of a kv head
TOLERANCE = 1e-6  # of outputs
IN_TESTS = {  # each code, allocation and way of appending is met
    "compact": "chunks",
    "groups, ordered": "singles",
    "k2v3 trellis, sliding, paged": "singles",
    "allocation": "chunks",
    "before RoPE": "chunks",
    "prod keys, paged": "chunks",
    "keys in full precision, paged": "chunks",
    "short scales, paged": "singles",
}


def unlike(recorded: dict[str, Any]) -> str:
    """Why digests cannot be compared here: another jax or CPU may round sums otherwise. Or ""."""
    here = {"jax": jax.__version__, "machine": _machine()}
    return "; ".join(f"{k}: {recorded[k]}, here {x}" for k, x in here.items() if recorded[k] != x)


def _machine() -> list[str]:
    """The architecture, and of its vector instructions those that XLA picks between."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    return [platform.machine(), *sorted(flags & {"avx2", "avx512f", "fma"})]


@dataclass(frozen=True)
class Setting:
    """A cache, and the ragged counts of tokens that its three rows get before and after a fork."""

    config: CacheConfig
    capacity: int = 64
    num_pages: int | None = None  # None: dense
    allocation: cache.Allocation | None = None
    ordered: bool = False  # each head has an order of channels
    scores: Scores = PLAIN
    sink_logits: bool = False
    first: tuple[int, ...] = (29, 12, 5)
    second: tuple[int, ...] = (17, 20, 3)


def _setting(layers, heads, dim, key, value, *, config=None, **rest) -> Setting:
    """Of bits, or of arguments of `CodecConfig`."""
    key, value = (CodecConfig(**x) if isinstance(x, dict) else CodecConfig(x) for x in (key, value))
    small = {"block": 8, "window": 8, "sinks": 2} | (config or {})
    return Setting(CacheConfig(layers, heads, dim, key, value, **small), **rest)


def _trellis(bits, **rest):
    return {"bits": bits, "code": "trellis"} | rest


def _preset(name) -> Setting:
    config = cache.preset(name, 2, 1, 64)
    return Setting(config, capacity=400, first=(262, 201, 20), second=(35, 70, 1))


BLOCKS = {"rotation": "block_hadamard"}
SETTINGS: dict[str, Setting] = {
    **{name: _preset(name) for name in ("lossless", "balanced", "compact", "max")},
    "k4v4": _setting(2, 2, 64, 4, 4, sink_logits=True),
    "k8v5, no window": _setting(
        1, 2, 80, {"bits": 8, **BLOCKS}, {"bits": 5, **BLOCKS}, num_pages=20,
        config={"window": 0, "sinks": 0, "center_keys": False, "dtype": "float32"},
    ),
    "k1v2, sliding": _setting(
        2, 1, 128, 1, 2, config={"sliding_window": 27, "dtype": "float32"}, scores=Scores(0.2, 4.0)
    ),
    "k2v3 trellis, sliding, paged": _setting(
        2, 2, 32, _trellis(2), _trellis(3), num_pages=9,
        config={"window": 0, "sinks": 3, "sliding_window": 20},
    ),
    "k3v4 trellis, not centred, paged": _setting(
        2, 2, 64, _trellis(3), _trellis(4), num_pages=12, scores=Scores(softcap=3.0),
        config={"sinks": 0, "center_keys": False, "dtype": "float32"},
    ),
    "groups, ordered": _setting(
        2, 2, 128, {"bits": ((32, 3), (96, 2)), **BLOCKS}, {"bits": ((32, 4), (96, 1)), **BLOCKS},
        ordered=True, config={"dtype": "float32"},
    ),
    "trellis groups, ordered, paged": _setting(
        1, 2, 64, _trellis(((16, 4), (48, 1)), **BLOCKS), _trellis(((16, 2), (48, 2)), **BLOCKS),
        ordered=True, num_pages=15, config={"window": 5, "sinks": 1},
    ),
    "scalar keys, groups of trellis values, sliding": _setting(
        2, 1, 64, 6, _trellis(((48, 2), (16, 3)), **BLOCKS), sink_logits=True,
        config={"window": 3, "sinks": 0, "sliding_window": 24, "center_keys": False},
    ),
    "haar, lloyd_max, unbiased": _setting(
        2, 1, 20, {"bits": 3, "rotation": "haar", "codebook": "lloyd_max", "scale": "unbiased"},
        {"bits": 4, "rotation": "haar", "codebook": "gaussian", "scale": "matched"},
        config={"dtype": "float16"},
    ),
    "identity, uniform, norm": _setting(
        1, 2, 16, {"bits": 7, "rotation": "identity", "codebook": "uniform", "scale": "norm"},
        {"bits": 2, "codebook": "uniform", "scale": "norm"}, num_pages=7,  # too few: overflows
        config={"window": 1},
    ),
    "before RoPE": _setting(
        2, 2, 64, 4, _trellis(2), config={"rope_frequencies": tuple(0.9**i for i in range(32))}
    ),
    "before RoPE, partly, sliding, paged": _setting(
        1, 2, 48, {"bits": 3, **BLOCKS}, {"bits": 3, **BLOCKS}, num_pages=20,
        config={"rope_frequencies": (1.0, 0.1, 0.01), "sliding_window": 30, "dtype": "float32"},
    ),
    "calibrated, trellis keys, scalar values, paged": _setting(
        2, 2, 64, _trellis(((16, 4), (16, 2), (32, 1)), scales="joint"),
        {"bits": ((32, 3), (32, 2)), "scales": "joint_products"}, num_pages=12,
    ),
    "prod keys, paged": _setting(
        2, 2, 64, {"bits": 3, "code": "prod", "scale": "norm", "sketch": "gaussian"}, 2,
        num_pages=12,
    ),
    "short scales, paged": _setting(
        2, 2, 64, _trellis(((16, 4), (16, 2), (32, 1)), scales="joint"), 3, num_pages=12,
        config={"scale_bits": 8, "rope_frequencies": (1.0, 0.1)},
    ),
    "keys in full precision, paged": _setting(2, 2, 32, 16, _trellis(2), num_pages=12),
    "values in full precision, sliding": _setting(
        2, 2, 32, 3, 16, config={"sliding_window": 30, "dtype": "float16"}
    ),
    "nothing compressed": _setting(2, 2, 32, 4, 4, config={"window": 62}),
    "allocation": _setting(
        3, 2, 32, 4, 4, num_pages=14, allocation=cache.Allocation((4, 2, 4), (3, 2, 3))
    ),
    "allocation, trellis": _setting(
        3, 1, 64, _trellis(4), _trellis(4), allocation=cache.Allocation((1, 3, 2), (2, 3, 2)),
        config={"sliding_window": 30, "dtype": "float32"},
    ),
    "allocation, calibrated groups": _setting(
        3, 2, 32, _trellis(4, scales="joint_products"), _trellis(4),
        allocation=cache.Allocation((((8, 4), (8, 2), (16, 1)), 2, ((16, 2), (16, 1))), (2, 3, 2)),
    ),
}  # fmt: skip


# ------------------------------------------------- the adapter: the only place that knows classes
def _create(setting: Setting, order):
    config = replace(setting.config, allocation=setting.allocation)
    return cache.create(
        config, BATCH, setting.capacity, key=jax.random.key(3), num_pages=setting.num_pages,
        key_order=order, value_order=None if order is None else order[..., ::-1],
        calibration=calibration(config),
    )  # fmt: skip


def arrays(state) -> dict[str, list[np.ndarray]]:
    """What a cache stores, by name: of every layer in turn, the pages that a sequence refers to.

    Planes of a layer are [pages, K, rows, bytes], group by group; scales uint32 [pages, K, tokens];
    signs of the keys' sketches are among their planes, and their norms too, [pages, K, tokens];
    sinks and window [B, slots, K, H], means float32 [B, K, H]; tables as they are.
    """
    heads, places = state.config.num_kv_heads, state.config.places
    held = np.asarray(state.table.references) > 0

    def pages(name):
        found = []
        for layer, (number,) in enumerate(places):
            first = heads * places[:layer].count((number,))
            for leaf in jax.tree.leaves(getattr(state.parts[number].pool, name)):
                rows = np.asarray(leaf)[first : first + heads]
                found.append(np.swapaxes(rows, 0, 1)[held])
        return found

    def exact(name):
        leaves = jax.tree.leaves(getattr(state, name))
        return [np.asarray(leaf)[layer] for layer in range(len(places)) for leaf in leaves]

    table = state.table
    return {
        "keys": pages("keys") + pages("sketches"),
        "values": pages("values"),
        "scales": pages("scales") + pages("bases"),
        "sinks": exact("sinks"),
        "window": exact("window"),
        "means": exact("key_mean"),
        "tables": [np.asarray(x) for x in (table.page_table, table.references)],
        "lengths": [np.asarray(x) for x in (table.lengths, table.pending, table.overflow)],
    }


# ------------------------------------------------- the scenario
def _tokens(setting: Setting, seed: int, count: int):
    """Queries [layers, B, T, N, H], keys and values [layers, B, T, K, H]; channels differ."""
    c, rng = setting.config, np.random.default_rng(seed)
    shape = (c.num_layers, BATCH, count, c.num_kv_heads, c.head_dim)
    spread = np.exp(rng.normal(0, 0.7, (2, c.num_layers, 1, 1, c.num_kv_heads, c.head_dim)))
    keys, values = (rng.normal(0.3, 1, (2, *shape)) * spread).astype(np.float32)
    heads = c.num_kv_heads * GROUP
    queries = rng.normal(0, 0.5, (*shape[:3], heads, c.head_dim)).astype(np.float32)
    return queries, keys, values


def _step(setting: Setting, state, queries, keys, values, counts):
    """Announce, attend and write layer by layer, commit; outputs [layers, B, T, N, 2]."""
    c = setting.config
    arguments: dict[str, Any] = {"scores": setting.scores}
    if setting.sink_logits:
        arguments["sink_logits"] = jnp.linspace(-1.0, 2.0, c.num_kv_heads * GROUP)
    state = cache.begin(state, counts, keys.shape[2])

    def layer(state, xs):
        output, state = attend_and_write(state, *xs, **arguments)
        return state, output[..., :2]

    layers = jnp.arange(c.num_layers)
    if setting.allocation is None:
        state, outputs = jax.lax.scan(layer, state, (layers, queries, keys, values))
    else:  # layers that differ
        outputs = []
        for i in range(c.num_layers):
            state, output = layer(state, (i, queries[i], keys[i], values[i]))
            outputs.append(output)
        outputs = jnp.stack(outputs)
    return cache.commit(state), outputs


def run(name: str, ways: tuple[str, ...] = ("chunks", "singles")) -> dict[str, Any]:
    """Digests of the scenario in chunks and one by one, and the last token's outputs of both."""
    setting = SETTINGS[name]
    c, order = setting.config, None
    if setting.ordered:
        shape = (c.num_layers, c.num_kv_heads, c.head_dim)
        order = np.random.default_rng(9).random(shape).argsort(-1).astype(np.int32)
    step = jax.jit(partial(_step, setting), compiler_options=QUICK)
    empty = jax.jit(partial(_create, setting), compiler_options=QUICK)(order)
    fork, free = (jax.jit(f, compiler_options=QUICK) for f in (cache.fork, cache.free))

    def append(state, most, seed, counts):
        """`counts` tokens, at most `most` at a time."""
        tokens = _tokens(setting, seed, 300)
        for start in range(0, max(counts), most):
            now = np.clip(np.array(counts) - start, 0, most).astype(np.int32)
            state, outputs = step(state, *(x[:, :, start : start + most] for x in tokens), now)
        return state, outputs

    found: dict[str, Any] = {}
    for way in ways:
        most = max(setting.first) if way == "chunks" else 1
        state, _ = append(empty, most, 1, setting.first)
        state = free(fork(state, 0, 2), np.arange(BATCH) == 1)
        state, _ = append(state, most, 2, setting.second)
        stored = arrays(state)
        _, outputs = append(state, most, 3, (1, 1, 1))
        found[way] = {name: _digest(values) for name, values in stored.items()}
        found[way + " outputs"] = np.asarray(outputs[:, :, 0]).ravel()
    return found


def _digest(values: list[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(f"{value.dtype} {value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def compare(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Names of what differs, of the ways that were run."""
    ways = [way for way in ("chunks", "singles") if way in found]
    wrong = [
        f"{way}: {name}"
        for way in ways
        for name, digest in expected[way].items()
        if found[way][name] != digest
    ]
    for way in ways:
        outputs = found[way + " outputs"]
        if not np.allclose(outputs, expected["outputs"], rtol=TOLERANCE, atol=TOLERANCE):
            wrong.append(way + " outputs")
    return wrong


def _record(found: dict[str, Any]) -> dict[str, Any]:
    outputs = [round(float(x), 7) for x in found["chunks outputs"]]
    return {"chunks": found["chunks"], "singles": found["singles"], "outputs": outputs}


def main() -> None:
    if "--write" in sys.argv:
        settings = {name: _record(run(name)) for name in SETTINGS}
        made = {"jax": jax.__version__, "machine": _machine(), "settings": settings}
        FILE.write_text(json.dumps(made, indent=1) + "\n")
    recorded = json.loads(FILE.read_text())
    if reason := unlike(recorded):
        sys.exit(reason)
    wrong = {name: compare(run(name), x) for name, x in recorded["settings"].items()}
    sys.exit("\n".join(f"{name}: {what}" for name, what in wrong.items() if what) or 0)


if __name__ == "__main__":
    main()
