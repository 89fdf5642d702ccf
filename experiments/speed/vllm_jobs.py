"""The engines that `vllm_speed` starts: what each is told, and what decides its programs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.speed import vllm_environment, vllm_kernels
from experiments.speed.vllm_claims import IN_TREE, OURS, THEIRS
from experiments.speed.vllm_kernels import Sizes
from turboquant_jax.models import PRESETS
from turboquant_jax.models.config import LlamaConfig
from turboquant_jax.vllm.settings import BLOCK

if TYPE_CHECKING:
    from experiments.speed.vllm_speed import Config

ROOM = 512
"""Tokens that a request may have beside its prompt."""
SERVED = 4
"""Requests of the server: few, for every number of them has its graph."""
PROMPT = "The capital of France is"
SHARE = 0.2
"""Of a GPU, for an engine of a small model: several may run there."""


def jobs_of(config: "Config", folder: Path) -> dict[str, dict[str, Any]]:
    """Every engine, by name; random weights that some of them share go to `folder`."""
    makers = {"speed": _speed, "tokens": _tokens, "perplexity": _perplexity, "serve": _serve}
    found: dict[str, dict[str, Any]] = {}
    for part, make in makers.items():
        if part in config.parts:
            found |= make(config)
    if "tensor" in config.parts:
        vllm_environment.save_random(folder)
        found |= _tensor(config, folder)
    # theirs last: it is the one that may not start
    return dict(sorted(found.items(), key=lambda job: job[1]["head"]["backend"] == IN_TREE))


def _speed(config: "Config") -> dict[str, dict[str, Any]]:
    found = {}
    batches = sorted({int(case.partition("x")[0]) for case in config.cases})
    longest = max(int(case.partition("x")[2]) for case in config.cases)
    pairs = [(b, w) for b in config.backends for w in (config.windows if b == OURS else (0,))]
    for backend, window in pairs:
        head = {"part": "speed", "backend": backend, "bits": 16 if backend == THEIRS else 4}
        found[f"speed {backend} {window}"] = {
            "part": "speed", "head": head | _windowed(window), "folder": "",
            "model": _described(_sizes(config)), "cases": config.cases, "steps": config.steps,
            "repeats": config.repeats,
            "settings": _settings(
                backend, 4, window, dtype="bfloat16", kv_cache_memory_bytes=config.memory,
                max_model_len=longest + ROOM, max_num_seqs=max(batches),
                max_num_batched_tokens=2048, graphs=batches, load_format="dummy",
                enable_prefix_caching=False,
            ),
        }  # fmt: skip
    return found


def _real(config: "Config") -> list[tuple[str, int, int]]:
    """Backend, bits and window of the engines with real weights; the baseline first."""
    theirs = [(THEIRS, 32, 0)] * (THEIRS in config.backends)
    ours = [(OURS, bits, window) for bits in config.bits for window in config.windows]
    return [*theirs, *ours] if config.folder else []


def _tokens(config: "Config") -> dict[str, dict[str, Any]]:
    found = {}
    for backend, bits, window in _real(config):
        prompts = json.loads(Path(config.ids).read_text())
        head = {"part": "tokens", "backend": backend, "bits": bits}
        found[f"tokens {backend} {bits} {window}"] = {
            "part": "tokens", "head": head | _windowed(window), "model": None,
            "folder": config.folder, "prompts": prompts, "tokens": config.tokens,
            "blocks": config.blocks if backend == OURS else 0,
            "settings": _settings(
                backend, bits, window, dtype="float32", kv_cache_memory_bytes=1 << 30,
                max_model_len=2048, max_num_seqs=len(prompts), max_num_batched_tokens=config.chunk,
                graphs=[len(prompts)], gpu_memory_utilization=SHARE,
            ),
        }  # fmt: skip
    return found


def _perplexity(config: "Config") -> dict[str, dict[str, Any]]:
    found = {}
    for backend, bits, window in _real(config):
        head = {"part": "perplexity", "backend": backend, "bits": bits}
        found[f"perplexity {backend} {bits} {window}"] = {
            "part": "perplexity", "head": head | _windowed(window), "model": None,
            "folder": config.folder, "prompts": json.loads(Path(config.ids).read_text()),
            "settings": _settings(
                backend, bits, window, dtype="float32", kv_cache_memory_bytes=1 << 30,
                max_model_len=2048, max_num_seqs=1, max_num_batched_tokens=BLOCK, graphs=[1],
                gpu_memory_utilization=SHARE,
            ),
        }  # fmt: skip
    return found


def _serve(config: "Config") -> dict[str, dict[str, Any]]:
    """Servers of the first of `bits`: the model as it is, then compiled as vLLM does by default."""
    found = {}
    for compiled in (0, 1) if config.folder else ():
        settings = _settings(
            OURS, config.bits[0], 0, dtype="bfloat16", kv_cache_memory_bytes=1 << 30,
            max_model_len=2048, max_num_seqs=SERVED, graphs=[1, 2, SERVED],
            gpu_memory_utilization=SHARE,
        )  # fmt: skip
        if compiled:
            sizes = settings["compilation_config"]["cudagraph_capture_sizes"]
            settings["compilation_config"] = {"cudagraph_capture_sizes": sizes}
        found[f"serve {compiled}"] = {
            "part": "serve", "model": None, "folder": config.folder, "prompt": PROMPT,
            "head": {
                "part": "serve", "backend": OURS, "bits": config.bits[0], "compiled": compiled
            },
            "tokens": config.tokens, "settings": settings,
        }  # fmt: skip
    return found


def _windowed(window: int) -> dict[str, int]:
    return {"window": window} if window else {}


def _tensor(config: "Config", folder: Path) -> dict[str, dict[str, Any]]:
    """Engines of one and of two devices over the same weights."""
    found = {}
    prompts = [one["prompt_token_ids"] for one in vllm_environment.prompts()]
    prompts = [[token % 2000 + 3 for token in prompt] for prompt in prompts]
    for bits in config.bits:
        for devices in (1, 2):
            head = {"part": "tensor", "backend": OURS, "bits": bits, "devices": devices}
            found[f"tensor {bits} {devices}"] = {
                "part": "tensor", "head": head, "model": None, "folder": str(folder),
                "prompts": prompts, "tokens": config.tokens,
                "settings": _settings(
                    OURS, bits, 0, dtype="float32", kv_cache_memory_bytes=1 << 30,
                    max_model_len=2048, max_num_seqs=len(prompts), max_num_batched_tokens=512,
                    graphs=[len(prompts)], tensor_parallel_size=devices,
                    disable_custom_all_reduce=True,
                ),
            }  # fmt: skip
    return found


def _settings(
    backend: str, bits: int, window: int, *, graphs: list[int], **settings: Any
) -> dict[str, Any]:
    """Of an engine whose decode steps are CUDA graphs, and nothing else is compiled."""
    settings["compilation_config"] = {
        "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": graphs
    }  # fmt: skip
    if backend == IN_TREE:
        return settings | {"kv_cache_dtype": IN_TREE}
    settings["attention_config"] = {"backend": backend}
    if backend == OURS:
        own = {"bits": bits} | _windowed(window)
        settings |= {"block_size": BLOCK, "additional_config": {"turboquant": own}}
    return settings


def _sizes(config: "Config") -> LlamaConfig:
    sizes = PRESETS[config.model]
    return replace(sizes, num_layers=config.layers or sizes.num_layers)


def _described(sizes: LlamaConfig) -> dict[str, Any]:
    """The model as a Hugging Face configuration."""
    return dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size, num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads, num_key_value_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim, vocab_size=sizes.vocab_size, max_position_embeddings=65536,
        rms_norm_eps=sizes.rms_norm_eps, rope_theta=sizes.rope_theta, torch_dtype="bfloat16",
        hidden_act="silu", tie_word_embeddings=sizes.tie_embeddings, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip


def launched(job: dict[str, Any]) -> Sizes:
    """What decides the programs of an engine of ours."""
    from turboquant_jax.vllm.step import rows_of  # imports torch

    settings, model = job["settings"], job["model"]
    if model is None:
        model = json.loads((Path(job["folder"]) / "config.json").read_text())
    heads, devices = model["num_attention_heads"], settings.get("tensor_parallel_size", 1)
    sizes = Sizes(
        heads=heads // devices,
        kv_heads=model["num_key_value_heads"] // devices,
        head_dim=model.get("head_dim") or model["hidden_size"] // heads,
        bits=settings["additional_config"]["turboquant"]["bits"],
        window=settings["additional_config"]["turboquant"].get("window", 0),
        dtype=settings["dtype"],
        requests=settings["max_num_seqs"],
        context=settings["max_model_len"],
        pages=1,
        batches=tuple(settings["compilation_config"]["cudagraph_capture_sizes"]),
    )
    if job["part"] != "speed":  # single tokens beside chunks are any number
        padded = {rows_of(count, sizes.requests) for count in range(1, sizes.requests + 1)}
        sizes = replace(sizes, batches=tuple(sorted(padded)))
    memory = settings["kv_cache_memory_bytes"]
    return replace(sizes, pages=vllm_kernels.pages_of(sizes, model["num_hidden_layers"], memory))
