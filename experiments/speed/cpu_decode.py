"""SmolLM2 decoding on the CPU, beside Hugging Face transformers on the same machine.

`python -m experiments.speed.cpu_decode --peer PYTHON --out DIR`, where PYTHON is one with
torch, transformers, accelerate and gguf. All decode the same file in float32, greedily, one
sequence, all cores, the peer with its default cache of float32. Rounds alternate between them, and
a time is the median over rounds, so that other load on the machine falls on all; `load_average`
says how much there was.
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import time
from pathlib import Path

import jax.numpy as jnp

from experiments.harness import results
from experiments.harness.experiment import Row
from turboquant_jax.cache import CacheConfig, CodecConfig
from turboquant_jax.models import dense, load, timing
from turboquant_jax.models.checkpoint import packaged_smollm2
from turboquant_jax.models.dense import DENSE
from turboquant_jax.models.past import COMPRESSED

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


class Peer:
    """Transformers in its own interpreter; `seconds()` is one round, of a step."""

    def __init__(self, python: str, context: int, steps: int):
        command = [python, "-c", PEER, str(packaged_smollm2()), str(context), str(steps)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        torch, transformers = self._answer().split()
        self.versions = {"torch": torch, "transformers": transformers}

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


def measure(other: Peer, context: int, steps: int, rounds: int) -> list[Row]:
    """A row for transformers and one for each cache of ours."""
    checkpoint = load(stacked=False)
    model, config = checkpoint.model, checkpoint.config
    codec = CodecConfig(4)
    four = CacheConfig(config.num_layers, config.num_kv_heads, config.head_dim, codec, codec)
    sizes = 1, context, context + steps + 1

    def exact() -> dense.Dense:
        empty = dense.create(config, 1, sizes[2], jnp.float32)
        return dataclasses.replace(empty, lengths=jnp.full(1, context, jnp.int32))

    rows: dict[str, Peer | timing.DecodeLoop] = {
        "transformers": other,
        "float32": timing.DecodeLoop(model, exact, DENSE, steps),
        "4 bits": timing.DecodeLoop(
            model, lambda: timing.filled_cache(four, *sizes), COMPRESSED, steps
        ),
    }
    seconds = [[side.seconds() for side in rows.values()] for _ in range(rounds + 1)][1:]
    columns = list(zip(*seconds, strict=True))
    base = statistics.median(columns[0])
    return [
        {
            "implementation": name if name == "transformers" else "turboquant-jax",
            "cache": "float32" if name == "transformers" else name,
            "context": context,
            "milliseconds_per_token": 1e3 * statistics.median(found),
            "milliseconds_min": 1e3 * min(found),
            "milliseconds_max": 1e3 * max(found),
            "tokens_per_second": 1 / statistics.median(found),
            "speed_over_transformers": base / statistics.median(found),
            "load_average": os.getloadavg()[0],
        }
        for name, found in zip(rows, columns, strict=True)
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", required=True, help="interpreter that has transformers")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()
    begin = time.perf_counter()
    peer = Peer(a.peer, a.context, a.steps)
    rows = measure(peer, a.context, a.steps, a.rounds)
    peer.process.kill()
    config = {"context": a.context, "steps": a.steps, "rounds": a.rounds}
    command = (
        "python -m experiments.speed.cpu_decode --peer PYTHON --out experiments/results/cpu_decode"
    )
    meta = results.describe(command, config, time.perf_counter() - begin)
    meta["versions"] |= peer.versions
    results.write(a.out, rows, meta, None)
    print(results.to_csv(rows))


if __name__ == "__main__":
    main()
