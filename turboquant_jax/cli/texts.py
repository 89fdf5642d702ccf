"""Texts and conversations from the command line, from files and from standard input."""

import argparse
import json
import re
import sys
from pathlib import Path

Row = str | list[dict]
"""A text to continue or to answer, or the messages of a conversation."""


def read(arguments: argparse.Namespace) -> list[Row]:
    """What to answer, a row each: plain texts, or conversations with the system's message first.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file of another form, and no prompt in it.
    """
    if arguments.messages is not None:
        return [_system(arguments) + messages(arguments.messages)]
    if arguments.prompts is not None:
        prompts: list[str] = lines(arguments.prompts)
    elif arguments.prompt == "-":
        prompts = [_standard_input()]
    else:
        prompts = [] if arguments.prompt is None else [arguments.prompt]
    if arguments.plain or arguments.system is None:
        return list(prompts)
    said: list[Row] = [[*_system(arguments), _user(prompt)] for prompt in prompts]
    return said or [_system(arguments)]


def lines(path: Path) -> list[str]:
    r"""The lines of a file that are not blank. A line ends at \n or \r\n, and nowhere else."""
    text = _text(path, "a prompt a line")
    prompts = [line for line in re.split("\r?\n", text) if line.strip()]
    if not prompts:
        raise ValueError(f"{path}: got no prompt, expected one a line")
    return prompts


def messages(path: Path) -> list[dict]:
    """The messages of a JSON file, as they are: the chat template says what they must have."""
    try:
        found = json.loads(_text(path, "a conversation"))
    except ValueError as error:
        raise ValueError(f"{path}: got {error}, expected JSON") from error
    if not isinstance(found, list) or not found or not all(map(_is_message, found)):
        expected = 'a list of messages, {"role": "user", "content": "..."}'
        raise ValueError(f"{path}: got other JSON, expected {expected}")
    return found


def decode(data: bytes, name: str) -> str:
    """UTF-8 text, a byte order mark left out; ValueError for other bytes."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: got {error}, expected UTF-8 text") from error


def _text(path: Path, expected: str) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected {expected}")
    return decode(path.read_bytes(), str(path))


def _standard_input() -> str:
    text = decode(sys.stdin.buffer.read(), "standard input")
    text = re.sub("\r?\n\\Z", "", text)  # what ends the last line is not the prompt's
    if not text.strip():
        raise ValueError("standard input: got no text, expected a prompt")
    return text


def _is_message(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("role"), str)


def _system(arguments: argparse.Namespace) -> list[dict]:
    return [] if arguments.system is None else [{"role": "system", "content": arguments.system}]


def _user(text: str) -> dict:
    return {"role": "user", "content": text}
