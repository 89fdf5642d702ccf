"""`vllm serve` as it is documented, started in a process of its own and asked one question."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from experiments.harness.experiment import Row
from experiments.speed import vllm_environment

CLI = "vllm.entrypoints.cli.main"
"""What the script `vllm` calls; a folder of packages has no scripts."""


class Server:
    """The server of a job: `rows` starts it, asks, and ends it."""

    def __init__(self, folder: Path, name: str, job: dict[str, Any]):
        self.log, self.job = folder / f"{name}.log", job
        self.process: subprocess.Popen | None = None

    def rows(self, seconds: float) -> list[Row]:
        """How long it took to start and to answer, and its answer; a note if it had no time."""
        begun, port = time.monotonic(), _free_port()
        address = f"http://127.0.0.1:{port}"
        environment = os.environ | vllm_environment.OFFLINE | {"JAX_PLATFORMS": "cpu"}
        del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]  # the server's engine is a process
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command(self.job, port), env=environment, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        try:
            while not _is_up(address):
                if self.process.poll() is not None:
                    return [self.job["head"] | {"note": f"ended with {self.process.returncode}"}]
                if time.monotonic() - begun > seconds:
                    return [self.job["head"] | {"note": f"not up after {seconds:.0f} s"}]
                time.sleep(0.5)
            up = time.monotonic()
            answer = _asked(address, self.job, seconds - (up - begun))
            done = time.monotonic()
        except OSError as error:
            return [self.job["head"] | {"note": f"no answer: {error}"}]
        finally:
            self.close()
            print(self.log.read_text(), file=sys.stderr, flush=True)
        held = re.search(r"KV cache size: ([\d,]+) tokens", self.log.read_text())
        return [
            self.job["head"]
            | {
                "start_seconds": round(up - begun, 1),
                "kv_tokens": int(held[1].replace(",", "")) if held else 0,
                "seconds": round(done - up, 2),
                "tokens": answer["usage"]["completion_tokens"],
                "answer": " ".join(answer["choices"][0]["text"].split()),
            }
        ]

    def close(self) -> None:
        """End it, and the engine that it started."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def command(job: dict[str, Any], port: int) -> list[str]:
    """`vllm serve MODEL` with the job's settings as its flags."""
    settings = dict(job["settings"])
    backend = settings.pop("attention_config")["backend"]
    found = [sys.executable, "-m", CLI, "serve", job["folder"], "--attention-backend", backend]
    for name, value in (settings | {"host": "127.0.0.1", "port": port}).items():
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        found += [f"--{name.replace('_', '-')}", text]
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def _asked(address: str, job: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The completion of the job's prompt."""
    words = {"model": job["folder"], "prompt": job["prompt"], "temperature": 0.0}
    words["max_tokens"] = job["tokens"]
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(words).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=max(1.0, seconds)) as answer:
        return json.load(answer)
