"""Text and JSON out of the files of a checkpoint; whatever else they hold is refused by name."""

import json
from pathlib import Path
from typing import Any


def read_text(path: Path) -> str:
    """The text of a file in UTF-8; ValueError for any other."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: got {error}, expected UTF-8 text") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file; FileNotFoundError without the file, ValueError for other JSON."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected that of a Hugging Face folder")
    text = read_text(path)
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: got {error}, expected JSON") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: got a {type(entries).__name__}, expected a JSON object")
    return entries
