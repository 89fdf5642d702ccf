"""One engine of vLLM, in a process of its own: what `vllm_speed` asks it for.

It imports, says "ready", and starts its engine when it is told to: so imports of several engines
are over before the first is measured, and none is measured beside another.
"""

import json
import logging
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.speed import vllm_environment

IN_TREE = "turboquant_4bit_nc"
WARM_UP = 8
"""Steps before the first that is timed."""


def main(out: str) -> None:
    """Read a job from standard input once all is imported; rows go to the file as they come."""
    begun = time.perf_counter()
    import vllm.entrypoints.llm
    import vllm.v1.worker.gpu_model_runner  # noqa: F401

    import turboquant_jax.pytorch.kernels
    import turboquant_jax.vllm

    turboquant_jax.vllm.register()  # the wheel's entry point, where nothing is installed
    print(f"ready after {time.perf_counter() - begun:.0f} s", flush=True)
    job, rows = json.loads(sys.stdin.readline()), []
    begun = time.perf_counter()
    for row in PARTS[job["part"]](job):
        rows.append(row)
        Path(out).write_text(json.dumps(rows))
        words = {k: v for k, v in row.items() if not k.endswith("_of")}
        print(f"{time.perf_counter() - begun:.0f} s: {words}", flush=True)


def speed(job: dict[str, Any]) -> Iterator[dict]:
    """Rows of decoding: batch by batch, at contexts that are there at once."""
    llm, head = _start(job)
    for case in job["cases"]:
        batch, context = map(int, case.split("x"))
        yield head | {"batch": batch, "context": context} | _decode(llm, job, batch, context)


def tokens(job: dict[str, Any]) -> Iterator[dict]:
    """Greedy tokens of some prompts: at first, from cached prefixes, without, and after preemption.

    `tokens_of` are those of each prompt with the lead of each over the second best, in log
    probability.
    """
    llm, head = _start(job)
    names = ("first", "prefixes cached", "again from nothing", "preempted")
    for name in names[: 4 if job["blocks"] else 3]:
        if name != names[1]:
            llm.reset_prefix_cache()
        with _Preemptions(llm, job["blocks"] if name == names[3] else 0) as seen:
            begun = time.perf_counter()
            found, cached = _greedy(llm, job["prompts"], job["tokens"])
        yield head | {
            "run": name,
            "seconds": round(time.perf_counter() - begun, 2),
            "cached_tokens": cached,
            "preemptions": seen.count,
            "tokens_of": found,
        }


def _start(job: dict[str, Any]) -> tuple[Any, dict]:
    """vLLM's `LLM`, and what it said of itself when it started."""
    said = _Said()
    logging.getLogger("vllm").addHandler(said)
    _mend_theirs()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if job["model"] is not None:
            (Path(folder) / "config.json").write_text(json.dumps(job["model"]))
        llm = vllm_environment.load(job["folder"] or folder, **job["settings"])
    if job["settings"].get("load_format") == "dummy":
        for cache in _runner(llm).kv_caches:
            # random bytes that are small positive numbers in every format
            _bytes_of(cache).random_(0, 64)
    return llm, {
        "start_seconds": round(time.perf_counter() - begun, 1),
        "kv_tokens": int(said.found.replace(",", "")),
        "graphs": int(
            bool(llm.llm_engine.vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs())
        ),
    }


def _mend_theirs() -> None:
    """So that vLLM's TurboQuant starts: all of its layers are compressed, and have their pages.

    It would keep the first and last layers in bfloat16, with flash attention, which the environment
    does not have; and the first runner of 0.26 asks it for pages of a type that it does not know.
    """
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
    from vllm.v1.attention.backends.turboquant_attn import TurboQuantAttentionBackend

    TurboQuantConfig.get_boundary_skip_layers = staticmethod(lambda *_: [])
    shape = TurboQuantAttentionBackend.get_kv_cache_shape

    def get_kv_cache_shape(*sizes: int, cache_dtype_str: str = IN_TREE) -> tuple[int, ...]:
        return shape(*sizes, IN_TREE if cache_dtype_str == "auto" else cache_dtype_str)

    TurboQuantAttentionBackend.get_kv_cache_shape = staticmethod(get_kv_cache_shape)


class _Said(logging.Handler):
    """How many tokens vLLM's log says that its cache holds."""

    found = "0"

    def emit(self, record: logging.LogRecord) -> None:
        match = re.search(r"KV cache size: ([\d,]+) tokens", record.getMessage())
        self.found = match[1] if match else self.found


def _decode(llm: Any, job: dict[str, Any], batch: int, context: int) -> dict:
    """Tokens a second of steps in which every request has one new token, and the step's time."""
    import torch

    engine, steps = llm.llm_engine, job["steps"]
    total = WARM_UP + steps * job["repeats"] + 8
    rule = _rule(total)
    with _TokensAreThere(llm):
        for number in range(batch):
            ids = [(7 * i + 13 * number) % 500 + 3 for i in range(context)]
            engine.add_request(f"{context} {number}", {"prompt_token_ids": ids}, rule)
        for _ in range(WARM_UP):
            engine.step()
        times, made = [], []
        for _ in range(job["repeats"]):
            torch.accelerator.synchronize()
            begun, before = time.perf_counter(), _done(engine.step())
            for _ in range(steps - 1):
                engine.step()
            after = _done(engine.step())
            torch.accelerator.synchronize()
            times.append((time.perf_counter() - begun) / (steps + 1))
            made.append(after - before)
        engine.abort_request([f"{context} {number}" for number in range(batch)])
        while engine.has_unfinished_requests():
            engine.step()
    if set(made) != {batch * steps}:
        raise RuntimeError(f"tokens of {steps} steps: got {made}, expected {batch * steps} each")
    step = statistics.median(times)
    return {
        "milliseconds_per_step": 1000 * step,
        "milliseconds_longest": 1000 * max(times),
        "tokens_per_second": batch / step,
    }


def _done(outputs: Sequence[Any]) -> int:
    """Tokens that all requests have by now."""
    return sum(len(one.outputs[0].token_ids) for one in outputs)


class _TokensAreThere:
    """Requests whose prompts, but for the last token, count as computed: no time goes into them."""

    def __init__(self, llm: Any):
        self.scheduler = _scheduler(llm)

    def __enter__(self) -> None:
        add = type(self.scheduler).add_request

        def add_request(request: Any) -> None:
            request.num_computed_tokens = request.num_prompt_tokens - 1
            request.prefill_stats = None
            add(self.scheduler, request)

        self.scheduler.add_request = add_request

    def __exit__(self, *_: object) -> None:
        del self.scheduler.add_request


class _Preemptions:
    """Counts them; leaves the scheduler so many free blocks, if not 0."""

    def __init__(self, llm: Any, blocks: int):
        self.scheduler, self.blocks, self.count = _scheduler(llm), blocks, 0

    def __enter__(self) -> "_Preemptions":
        pool, preempt = self.scheduler.kv_cache_manager.block_pool, self.scheduler._preempt_request
        free = pool.get_num_free_blocks()
        self.taken = pool.get_new_blocks(free - self.blocks) if self.blocks else []

        def counted(*arguments: Any, **named: Any) -> Any:
            self.count += 1
            return preempt(*arguments, **named)

        self.scheduler._preempt_request = counted
        return self

    def __exit__(self, *_: object) -> None:
        del self.scheduler._preempt_request
        self.scheduler.kv_cache_manager.block_pool.free_blocks(self.taken)


def _greedy(llm: Any, prompts: Sequence[Sequence[int]], count: int) -> tuple[list, int]:
    """[(token, lead)] of each prompt; tokens of prompts that were found in the cache."""
    done = llm.generate(
        [{"prompt_token_ids": list(x)} for x in prompts], _rule(count, 2), use_tqdm=False
    )
    found = []
    for one in done:
        output, leads = one.outputs[0], []
        for options in output.logprobs:
            best = sorted((x.logprob for x in options.values()), reverse=True)
            leads.append(best[0] - best[1])
        found.append(list(zip(output.token_ids, leads, strict=True)))
    return found, sum(one.num_cached_tokens or 0 for one in done)


def tensor(job: dict[str, Any]) -> Iterator[dict]:
    """Greedy tokens of an engine over `devices`, at first and from cached prefixes."""
    llm, head = _start(job)
    for name in ("first", "prefixes cached"):
        found, cached = _greedy(llm, job["prompts"], job["tokens"])
        yield head | {"run": name, "cached_tokens": cached, "tokens_of": found}


def perplexity(job: dict[str, Any]) -> Iterator[dict]:
    """Losses of the tokens of all prompts, but for the first of each."""
    from vllm import SamplingParams

    llm, head = _start(job)
    rule = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, prompt_logprobs=0)
    done = llm.generate(
        [{"prompt_token_ids": list(x)} for x in job["prompts"]], rule, use_tqdm=False
    )
    losses = [
        -options[token].logprob
        for one in done
        for token, options in zip(one.prompt_token_ids[1:], one.prompt_logprobs[1:], strict=True)
    ]
    yield head | {"losses_of": losses}


def _rule(count: int, logprobs: int | None = None) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=count, temperature=0.0, detokenize=False, ignore_eos=True, logprobs=logprobs
    )


def _scheduler(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def _runner(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def _bytes_of(x: Any) -> Any:
    """All the memory of a tensor, whatever its strides."""
    import torch

    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())


PARTS: dict[str, Callable[[dict], Iterator[dict]]] = {
    "speed": speed,
    "tokens": tokens,
    "perplexity": perplexity,
    "tensor": tensor,
}

if __name__ == "__main__":
    main(sys.argv[1])
