"""`turboquant-jax chat`."""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import jax
from rich.console import Console

from turboquant_jax.cli import compiling, generate, settings
from turboquant_jax.models import load
from turboquant_jax.models.conversation import Conversation


def run(arguments: argparse.Namespace, console: Console) -> dict:
    """Answer line by line, until the input ends."""
    with compiling.shown("load the model"):
        checkpoint = load(arguments.model, settings.dtype(arguments.dtype), stacked=False)
    if checkpoint.tokenizer.chat_template is None:
        raise ValueError(f"{checkpoint.name}: got no chat template, expected a model that chats")
    generate.say_rotation(arguments, checkpoint)
    most = checkpoint.config.max_position
    if arguments.capacity is not None and arguments.capacity > most:
        raise ValueError(f"--capacity: got {arguments.capacity}, expected at most {most}")
    conversation = Conversation(
        checkpoint,
        lambda capacity: settings.empty_past(
            arguments, checkpoint.config, 1, capacity, checkpoint.model
        ),
        messages=[{"role": "system", "content": arguments.system}] if arguments.system else [],
        capacity=arguments.capacity,
        chunk=arguments.chunk,
    )
    turns: list[dict[str, Any]] = []
    for line in _lines():
        pieces = conversation.ask(
            line,
            key=jax.random.key(arguments.seed),
            max_tokens=arguments.tokens,
            sampling=arguments.sampling,
            ends=arguments.stop,
        )
        _print(pieces)
        answer = conversation.messages[-1]["content"]
        turns.append(
            {"prompt": line, "text": answer, "read_tokens": conversation.read_tokens}
            | {"tokens": conversation.tokens}
        )
    return {"model": checkpoint.name, "capacity": conversation.capacity, "turns": turns}


def _lines() -> Iterator[str]:
    """What is said: asked for on a terminal, read from standard input elsewhere."""
    if not sys.stdin.isatty():
        yield from (line for line in map(str.rstrip, sys.stdin) if line)
        return
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        if line.strip():
            yield line


def _print(pieces: Iterator[str]) -> None:
    """As they come; Ctrl-C ends the answer and not the conversation."""
    try:
        for piece in compiling.awaited(pieces, "read, and compile"):
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
    print()
