"""Batch and context of the cases of `llama_speed`, by the plan where a case asks for what fits."""

import re

from turboquant_jax.cache import CacheConfig
from turboquant_jax.cache.bytes import exact_bytes_per_token, planned_bytes
from turboquant_jax.cli.capacity import tokens_that_fit

_BESIDE = 2**21  # bytes that a sequence takes beside its past: logits, and what makes them
_BESIDE_ALONE = 2**28  # the same where there is one sequence, and more, for it costs few tokens


def fills(case: str) -> bool:
    """Whether the memory says how large it is."""
    return case.startswith(("largest", "longest"))


def size(
    case: str, sizes: CacheConfig, cache: CacheConfig | None, room: int, free: int
) -> tuple[int, int]:
    """Batch and context, so that `room` more tokens fit `free` bytes.

    Args:
      case: such as "8x4096", "largest4096" (batch) or "longest" (context of one sequence).
      sizes: layers, heads and head dim; the rest is not looked at.
      cache: the compressed cache, None for the dense past in full precision.

    Raises:
      ValueError: another case.
    """
    if match := re.fullmatch(r"(\d+)x(\d+)", case):
        return int(match[1]), int(match[2])
    each = exact_bytes_per_token(sizes)
    if case == "longest":
        free -= _BESIDE_ALONE
        return 1, (tokens_that_fit(cache, 1, free) if cache else free // each) - room
    if match := re.fullmatch(r"largest(\d+)", case):
        capacity = int(match[1]) + room
        per = each * capacity
        if cache:
            two, one = (planned_bytes(cache, n, capacity).total for n in (2, 1))
            per = two - one
        return max(1, free // (per + _BESIDE)), int(match[1])
    raise ValueError(f"got the case {case!r}, expected such as 8x4096, largest4096, longest")
