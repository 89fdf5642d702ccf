"""SmolLM2 decoding on the CPU, beside Hugging Face transformers on the same machine.

All decode the same file in float32, greedily, one
sequence, all cores, the peer with its default cache of float32. Rounds alternate between them, and
a time is the median over rounds, so that other load on the machine falls on all; `load_average`
says how much there was. The peer is an interpreter that has torch, transformers, accelerate and
gguf.
"""

import dataclasses
import os
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp

from experiments.harness import prepared
from experiments.harness.experiment import QUESTION, Claim, Row, Track, option, where
from turboquant_jax.cache import CacheConfig, CodecConfig
from turboquant_jax.models import dense, timing
from turboquant_jax.models.checkpoint import packaged_smollm2
from turboquant_jax.models.dense import DENSE
from turboquant_jax.models.model import Layer, unstack
from turboquant_jax.models.past import COMPRESSED

PEERS = "transformers"
PEER = """
import sys, time, torch, transformers
from pathlib import Path
from transformers import AutoModelForCausalLM

path, context, steps = Path(sys.argv[1]), *map(int, sys.argv[2:])
model = AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
).eval()
tokens = torch.randint(10, 40000, (1, context), generator=torch.Generator().manual_seed(0))
print(torch.__version__, transformers.__version__, flush=True)
for line in sys.stdin:
    with torch.inference_mode():
        out = model(tokens, use_cache=True)
        begin = time.perf_counter()
        for _ in range(steps):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        print((time.perf_counter() - begin) / steps, flush=True)
"""


NEEDS = "another interpreter, --peer, that has torch, transformers, accelerate and gguf"


@dataclass(frozen=True)
class Config:
    """What to run."""

    peer: str = option("", "interpreter that has transformers, or only ours is timed", path=True)
    model: str = option(prepared.SMOLLM2, "the peer's file is SmolLM2's; or tiny, alone")
    context: int = option(512, "tokens before the first step")
    steps: int = option(32, "steps of a round")
    rounds: int = option(5, "rounds that count")


SMOKE = Config("", "tiny", 16, 1, 1)


class Peer:
    """Transformers in its own interpreter; `seconds()` is one round, of a step."""

    def __init__(self, config: Config):
        sizes = str(config.context), str(config.steps)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [config.peer, "-c", PEER, str(packaged_smollm2()), *sizes],
            stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.versions = self._answer()

    def seconds(self) -> float:
        """One round."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise ValueError("got nothing from the peer, expected an interpreter with transformers")
        return line


def run(config: Config, track: Track) -> list[Row]:
    """A row for transformers and one for each cache of ours."""
    model = prepared.model(config.model)
    model = unstack(model) if isinstance(model.layers, Layer) else model
    sizes_of = model.config
    codec = CodecConfig(4)
    four = CacheConfig(sizes_of.num_layers, sizes_of.num_kv_heads, sizes_of.head_dim, codec, codec)
    sizes = 1, config.context, config.context + config.steps + 1

    def exact() -> dense.Dense:
        empty = dense.create(sizes_of, 1, sizes[2], jnp.float32)
        return dataclasses.replace(empty, lengths=jnp.full(1, config.context, jnp.int32))

    rows: dict[str, Peer | timing.DecodeLoop] = {PEERS: Peer(config)} if config.peer else {}
    rows |= {
        "float32": timing.DecodeLoop(model, exact, DENSE, config.steps),
        "4 bits": timing.DecodeLoop(
            model, lambda: timing.filled_cache(four, *sizes), COMPRESSED, config.steps
        ),
    }
    rounds = track(range(config.rounds + 1), "cpu_decode")
    seconds = [[side.seconds() for side in rows.values()] for _ in rounds][1:]
    versions = {name: side.versions for name, side in rows.items() if isinstance(side, Peer)}
    for side in rows.values():
        if isinstance(side, Peer):
            side.process.kill()
    columns = {name: found for name, *found in zip(rows, *seconds, strict=True)}
    base = statistics.median(columns.get(PEERS, [float("nan")]))
    return [
        {
            "implementation": name if name == PEERS else "turboquant-jax",
            "cache": "float32" if name == PEERS else name,
            "context": config.context,
            "milliseconds_per_token": 1e3 * statistics.median(found),
            "milliseconds_min": 1e3 * min(found),
            "milliseconds_max": 1e3 * max(found),
            "tokens_per_second": 1 / statistics.median(found),
            "speed_over_transformers": base / statistics.median(found),
            "load_average": os.getloadavg()[0],
            "versions": versions.get(name, ""),
        }
        for name, found in columns.items()
    ]


def claims(rows: Sequence[Row]) -> list[Claim]:
    """A token of ours takes no longer than one of transformers."""
    return [
        Claim(
            QUESTION,
            f"on the CPU, {row['cache']}: a token takes no longer than in transformers",
            f"{row['milliseconds_per_token']:.1f} ms, {row['speed_over_transformers']:.2f} times "
            "its tokens per second",
            "holds" if row["speed_over_transformers"] >= 1 else "does not hold",
        )
        for row in where(rows, implementation="turboquant-jax")
        if where(rows, implementation=PEERS)
    ] or [Claim(QUESTION, "a token takes no longer than in transformers", "ours only", "undecided")]
