"""`turboquant-jax generate`."""

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from turboquant_jax.cli import flags

FULL = 16


def add(commands) -> None:
    """The flags."""
    generate = commands.add_parser(
        "generate",
        help="text from one prompt or many, with a compressed cache",
        description="Answer a prompt, or every line of a file as one batch. Row i draws its tokens "
        "with seed + i, so that it is the same alone. --bits 16 is a dense, exact cache.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    generate.set_defaults(run=run)
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("prompt", nargs="?", help="what to answer")
    source.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt a line, one batch")
    generate.add_argument("--model", help=f"{flags.MODEL} (default: SmolLM2-135M)")
    generate.add_argument("--dtype", choices=("float32", "bfloat16"), help="of weights")
    generate.add_argument(
        "--plain", action="store_true", help="no chat template: continue the text"
    )
    generate.add_argument("--tokens", type=int, default=128, help="most tokens of an answer")
    generate.add_argument("--chunk", type=int, default=512, help="tokens of a pass over the prompt")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    generate.add_argument("--top-k", type=int, help="draw from the k most probable tokens")
    generate.add_argument("--top-p", type=float, help="draw from the smallest set this probable")
    generate.add_argument("--seed", type=int, default=0, help="of samples and rotations")
    generate.add_argument("--stream", action="store_true", help="print the text as it is made")
    flags.add_cache(generate, window=128)
    flags.add_allocation(generate)
    flags.add_json(generate)


def run(arguments: argparse.Namespace, console: Console) -> dict:
    """Generate and print."""
    from turboquant_jax.llama import load
    from turboquant_jax.llama.sampling import Sampling

    if arguments.stream and arguments.prompts is not None:
        raise ValueError("--stream prints one text, got --prompts with many")
    for name in ("tokens", "chunk"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    prompts, allocation = _prompts(arguments), flags.allocation(arguments)
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    checkpoint = load(arguments.model, flags.dtype(arguments.dtype), stacked=False)
    call = _prefilled(arguments, checkpoint, prompts, allocation)
    options: dict[str, Any] = dict(
        max_tokens=arguments.tokens, sampling=sampling, eos_ids=checkpoint.tokenizer.eos_ids
    )
    begin = time.perf_counter()
    rows = _tokens(call, options, checkpoint, arguments)
    seconds = time.perf_counter() - begin
    texts = [checkpoint.tokenizer.decode(row).strip() for row in rows]
    for prompt, text in zip(prompts, [] if arguments.stream else texts, strict=False):
        print(text if arguments.prompts is None else f"> {prompt}\n{text}")
    return {
        "model": checkpoint.name,
        "bits": asdict(allocation[0]) if allocation else flags.asked_bits(arguments),
        "seconds": seconds,  # of the answers, compilation included
        "answers": [
            {"prompt": p, "text": t, "tokens": row, "seed": arguments.seed + i}
            for i, (p, t, row) in enumerate(zip(prompts, texts, rows, strict=True))
        ],
    }


def _prefilled(arguments: argparse.Namespace, checkpoint, prompts: list[str], allocation) -> tuple:
    """What `decode` and `stream` take first: the prompts have been read."""
    import jax
    import jax.numpy as jnp

    from turboquant_jax.llama.generate import pad_prompts, prefill

    encoded = [_encode(checkpoint.tokenizer, text, arguments.plain) for text in prompts]
    tokens, lengths = map(jnp.asarray, pad_prompts(encoded))
    capacity, most = int(lengths.max()) + arguments.tokens, checkpoint.config.max_position
    if capacity > most:
        raise ValueError(
            f"prompt and answer have up to {capacity} tokens, expected at most {most} together"
        )
    state, past = _empty(arguments, checkpoint.config, len(prompts), capacity, allocation)
    keys = jnp.stack([jax.random.key(arguments.seed + i) for i in range(len(prompts))])
    chunk = min(arguments.chunk, tokens.shape[1])
    logits, state = prefill(checkpoint.model, tokens, lengths, state, past, chunk=chunk)
    return checkpoint.model, logits, lengths, keys, state, past


def _tokens(call: tuple, options: dict, checkpoint, arguments) -> list[list[int]]:
    """The tokens of each row, a stop token left out."""
    from turboquant_jax.llama.generate import decode, stream

    stops = checkpoint.tokenizer.eos_ids
    if not arguments.stream:
        made = decode(*call, **options)
        counted = zip(np.asarray(made.tokens), np.asarray(made.counts), strict=True)
        return [[int(t) for t in row[:count] if int(t) not in stops] for row, count in counted]
    row: list[int] = []

    def each():
        for step in stream(*call, **options):
            if int(step[0]) not in stops:
                row.append(int(step[0]))
                yield row[-1]

    for piece in checkpoint.tokenizer.stream(each()):
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()
    return [row]


def _prompts(arguments: argparse.Namespace) -> list[str]:
    if arguments.prompts is None:
        return [arguments.prompt]
    if not arguments.prompts.is_file():
        raise FileNotFoundError(f"{arguments.prompts}: no such file, expected a prompt a line")
    try:
        lines = arguments.prompts.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{arguments.prompts}: got {error}, expected UTF-8 text") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{arguments.prompts}: got no prompt, expected one a line")
    return prompts


def _encode(tokenizer, text: str, plain: bool) -> list[int]:
    if plain or tokenizer.chat_template is None:
        return tokenizer.encode(text)
    return tokenizer.encode_chat([{"role": "user", "content": text}])


def _empty(arguments: argparse.Namespace, config, batch: int, capacity: int, allocation):
    """An empty past and how it is used."""
    import jax

    from turboquant_jax import cache
    from turboquant_jax.demo import cache_config
    from turboquant_jax.llama import dense
    from turboquant_jax.llama.past import COMPRESSED

    key = jax.random.key(arguments.seed)
    if allocation is not None:
        layers, code = allocation
        options = {"code": code, "allocation": layers, **flags.segments(arguments)}
        compressed = cache_config(config, 4, 4, **options)
        return cache.create(compressed, batch, capacity, key=key), COMPRESSED
    bits = flags.asked_bits(arguments)
    if bits == (FULL, FULL):
        return dense.create(config, batch, capacity, flags.dtype(arguments.dtype)), dense.DENSE
    options = {"code": flags.code(arguments), **flags.segments(arguments)}
    compressed = cache_config(config, *bits, **options)
    return cache.create(compressed, batch, capacity, key=key), COMPRESSED
