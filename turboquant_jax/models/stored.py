"""The cache of a prompt in a file: read once, continued later by any prompt that begins with it.

The header of the file says which model filled the cache, with which tokens, and its capacity.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from turboquant_jax.cache import storage
from turboquant_jax.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
      path: the file.
      stamp: what `storage` has as the model: all of the following, as it is in the file.
      model: the name of the checkpoint, and a digest of its last norm.
      tokens: the tokens in the cache, oldest first.
      capacity: most tokens the cache can have.
    """

    path: Path
    stamp: str
    model: str
    tokens: tuple[int, ...]
    capacity: int


def save(
    state: Any, path: Path, tokens: Sequence[int], capacity: int, checkpoint: Checkpoint
) -> None:
    """Write a cache of one row, which these tokens have filled."""
    content = {
        "model": _name(checkpoint), "capacity": capacity, "tokens": [int(t) for t in tokens]
    }  # fmt: skip
    storage.save(state, path, model=json.dumps(content))


def open_header(path: Path) -> Header:
    """The header of a file that `save` wrote; ValueError for any other file."""
    try:
        with safe_open(path, framework="numpy") as file:
            stamp = (file.metadata() or {})["model"]
        found = json.loads(stamp)
        return Header(path, stamp, found["model"], tuple(found["tokens"]), int(found["capacity"]))
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: got {error!r}, expected the saved cache of a prompt") from error


def check(header: Header, prompt: Sequence[int], checkpoint: Checkpoint) -> None:
    """Whether the cache can be continued to this prompt.

    Raises:
      ValueError: another model's cache, or one of tokens that the prompt does not begin with, or
        that are all of it: at least one must be left to read.
    """
    if header.model != _name(checkpoint):
        raise ValueError(
            f"{header.path}: got a cache of {header.model}, expected one of {_name(checkpoint)}"
        )
    held = header.tokens
    same = next((i for i, (a, b) in enumerate(zip(held, prompt, strict=False)) if a != b), None)
    shared = min(len(held), len(prompt)) if same is None else same
    if shared < len(held) or len(prompt) == len(held):
        raise ValueError(
            f"{header.path}: got a cache of {len(held)} tokens and a prompt of {len(prompt)} that "
            f"begins with {shared} of them, expected a longer prompt that begins with all"
        )


def restore(header: Header, like: Any) -> Any:
    """The cache, in the place of an empty one of the same config and of the header's capacity."""
    return storage.restore(like, header.path, model=header.stamp)


def _name(checkpoint: Checkpoint) -> str:
    """Weights are told apart by their last norm: a fine-tuned model may keep its name."""
    norm = np.asarray(checkpoint.model.norm[...], np.float32)
    return f"{checkpoint.name} {hashlib.sha256(norm.tobytes()).hexdigest()[:16]}"
