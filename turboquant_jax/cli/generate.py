"""`turboquant-jax generate`."""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from turboquant_jax import cache
from turboquant_jax.cli import compiling, settings, speculation
from turboquant_jax.cli.texts import Row
from turboquant_jax.models import Checkpoint, load, stops, stored
from turboquant_jax.models.decoding import read, refuse_overflow, stream
from turboquant_jax.models.generate import NO_TOKEN, decode
from turboquant_jax.models.past import compressed
from turboquant_jax.models.tokenizer import Tokenizer

ROUNDED = 256
"""Capacities are multiples of it, so that prompts of similar length run the same programs."""


def run(arguments: argparse.Namespace, console: Console) -> dict:
    """Generate and print."""
    settings.join_hosts(arguments)
    allocation = settings.allocation(arguments.allocation)
    with compiling.shown("load the model"):
        dtype, mesh = settings.dtype(arguments.dtype), settings.mesh(arguments)
        checkpoint = load(arguments.model, dtype, stacked=False, mesh=mesh)
    say_rotation(arguments, checkpoint)
    prompts = [_encode(checkpoint.tokenizer, row, arguments.plain) for row in arguments.rows]
    asked = arguments.rows * arguments.samples
    begin = time.perf_counter()
    call, loaded = _read(arguments, checkpoint, prompts)
    rows: list[list[int]] = []
    took = None
    if arguments.tokens:
        rows, took = _tokens(call, checkpoint, arguments, prompts * arguments.samples)
    seconds = time.perf_counter() - begin
    texts = [_cut(checkpoint.tokenizer.decode(row), arguments.stop).strip() for row in rows]
    for i, text in enumerate([] if arguments.stream else texts):
        named = f"> seed {arguments.seed + i}\n" if arguments.samples > 1 else ""
        print(f"> {_shown(asked[i])}\n{text}" if arguments.prompts else named + text)
    return {
        "model": checkpoint.name,
        "bits": _said_bits(arguments, checkpoint, allocation),
        "rotation": settings.segments(arguments, checkpoint.config.head_dim)["rotation"],
        "seconds": seconds,  # of the answers, compilation included
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "loaded_tokens": loaded,
        "speculation": took,
        "answers": [
            {"prompt": p, "text": t, "tokens": row, "seed": arguments.seed + i}
            for i, (p, t, row) in enumerate(zip(asked, texts, rows, strict=bool(rows)))
        ],
    }


def _said_bits(
    arguments: argparse.Namespace, checkpoint: Checkpoint, allocation: tuple | None
) -> Any:
    """Bits of keys and values, of every head where they differ."""
    kind = settings.calibrated(arguments, checkpoint.config)
    if kind is not None and kind.config.allocation is not None:
        return asdict(kind.config.allocation)
    return asdict(allocation[0]) if allocation else settings.asked_bits(arguments)


def say_rotation(arguments: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """On standard error, where the head dim and not the user chose another than the usual one."""
    dim = checkpoint.config.head_dim
    chosen = settings.segments(arguments, dim)["rotation"]
    if arguments.rotation is None and chosen != "hadamard" and not settings.is_dense(arguments):
        said = f"turboquant-jax: head dim {dim} is no power of two: {chosen} rotation"
        print(said, file=sys.stderr)


def _read(
    arguments: argparse.Namespace, checkpoint: Checkpoint, prompts: list[list[int]]
) -> tuple[tuple, int]:
    """What `decode` and `stream` take first, the prompts read; tokens that a file had read."""
    header = None if arguments.load_cache is None else stored.open_header(arguments.load_cache)
    capacity = _capacity(arguments, checkpoint.config.max_position, prompts, header)
    if header is not None:
        stored.check(header, prompts[0], checkpoint)
    sizes = checkpoint.config, len(prompts), capacity
    state, past = settings.empty_past(arguments, *sizes, checkpoint.model)
    loaded = 0
    if header is not None:
        state, loaded = stored.restore(header, state), len(header.tokens)
    with compiling.shown(f"read {sum(map(len, prompts)) - loaded:,} tokens, and compile"):
        model, held, chunk = checkpoint.model, loaded, arguments.chunk
        if arguments.save_cache is not None:
            held = max(held, _kept(checkpoint.tokenizer, arguments, prompts[0]))
            if held > loaded:
                new = [prompts[0][loaded:held]]
                _, _, state = read(model, new, state, past, start=loaded, chunk=chunk)
            stored.save(state, arguments.save_cache, prompts[0][:held], capacity, checkpoint)
        if arguments.tokens == 0:
            return (), loaded
        new = [prompt[held:] for prompt in prompts]
        logits, lengths, state = read(model, new, state, past, start=held, chunk=chunk)
        if (count := arguments.samples) > 1:
            state = cache.repeat(state, count)
            past = compressed(shared_blocks=cache.shared_blocks(state))
            logits, lengths = (jnp.repeat(x, count, axis=0) for x in (logits, lengths))
        jax.block_until_ready(logits)
    keys = jnp.stack([jax.random.key(arguments.seed + i) for i in range(len(logits))])
    return (model, logits, lengths, keys, state, past), loaded


def _capacity(
    arguments: argparse.Namespace, most: int, prompts: list[list[int]], header: stored.Header | None
) -> int:
    """Tokens that a row has room for: those of the file, as asked, or what is needed, rounded up.

    Raises:
      ValueError: a row that needs more, or more than the `most` of the model.
    """
    answer = arguments.tokens
    needed = max(map(len, prompts)) + answer
    if needed > most:
        raise ValueError(
            f"prompt and answer have up to {needed} tokens, expected at most {most} together"
        )
    if header is not None:
        capacity = header.capacity
    else:
        capacity = arguments.capacity or min(most, -(-needed // ROUNDED) * ROUNDED)
    for row, prompt in enumerate(prompts):
        if len(prompt) + answer > capacity:
            hint = "" if header is None else "; --capacity gives a cache more when it is saved"
            raise ValueError(
                f"row {row}: got a prompt of {len(prompt)} tokens and an answer of up to {answer}, "
                f"expected at most the capacity of {capacity} together{hint}"
            )
    return capacity


def _kept(tokenizer: Tokenizer, arguments: argparse.Namespace, prompt: list[int]) -> int:
    """How many tokens of the prompt a longer one begins with: not the header of the answer."""
    (row,) = arguments.rows
    bare = _encode(tokenizer, row, arguments.plain, add_generation_prompt=False)
    pairs = enumerate(zip(prompt, bare, strict=False))
    shared = next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(bare)))
    return min(shared, len(prompt) - 1)  # the last one is read again, for what follows it


def _tokens(
    call: tuple, checkpoint: Checkpoint, arguments: argparse.Namespace, prompts: list[list[int]]
) -> tuple[list[list[int]], dict | None]:
    """The tokens of each row, a stop token left out and what makes a stop string left in.

    Beside them what drafts took, where there were any.
    """
    tokenizer = checkpoint.tokenizer
    options: dict[str, Any] = dict(
        max_tokens=arguments.tokens,
        sampling=replace(arguments.sampling, eos_ids=tuple(tokenizer.eos_ids)),
    )
    if arguments.stream:
        return [_stream(stream(*call, **options), tokenizer, arguments.stop)], None
    took = None
    with compiling.shown("answer, and compile"):
        if arguments.stop:
            return _until(stream(*call, **options), tokenizer, arguments.stop), None
        if arguments.drafts is None:
            made = decode(*call, **options)
        else:
            drafts = speculation.prepare(arguments, checkpoint, prompts, call[4])
            made, took = speculation.answer(call, drafts, **options)
        counted = zip(np.asarray(made.tokens), np.asarray(made.counts), strict=True)
        refuse_overflow(made.state)
    ended = (*tokenizer.eos_ids, NO_TOKEN)
    return [[int(t) for t in row[:count] if int(t) not in ended] for row, count in counted], took


def _stream(steps: Iterator[np.ndarray], tokenizer: Tokenizer, ends: list[str]) -> list[int]:
    """Print one row as it is made."""
    row: list[int] = []

    def each() -> Iterator[int]:
        for step in compiling.awaited(steps, "compile a step"):
            if int(step[0]) not in tokenizer.eos_ids:
                row.append(int(step[0]))
                yield row[-1]

    for piece in stops.until(tokenizer.stream(each()), ends):
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()
    return row


def _until(steps: Iterator[np.ndarray], tokenizer: Tokenizer, ends: list[str]) -> list[list[int]]:
    """The rows, until each has ended by itself or has made a stop string."""
    rows: list[list[int]] = []
    going: set[int] = set()
    for step in steps:
        if not rows:
            rows, going = [[] for _ in step], set(range(len(step)))
        for i in sorted(going):
            if (token := int(step[i])) in (*tokenizer.eos_ids, NO_TOKEN):
                going.remove(i)
                continue
            rows[i].append(token)
            if stops.find(tokenizer.decode(rows[i]), ends) is not None:
                going.remove(i)
        if not going:
            break
    return rows


def _cut(text: str, ends: list[str]) -> str:
    return text[: stops.find(text, ends)]


def _encode(tokenizer: Tokenizer, row: Row, plain: bool, **options: Any) -> list[int]:
    """Token ids of a text, or of a conversation as the template renders it with these options."""
    if isinstance(row, str) and (plain or tokenizer.chat_template is None):
        return tokenizer.encode(row)
    said = [{"role": "user", "content": row}] if isinstance(row, str) else row
    return tokenizer.encode_chat(said, **options)


def _shown(row: Row) -> str:
    return row if isinstance(row, str) else row[-1]["content"]
