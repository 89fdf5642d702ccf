"""Stop strings: where a text ends, and what of it may be shown before that is known.

A text ends in front of the stop string that is complete first; of two that end together, in front
of the longer one. That can be decided while the text is being made.
"""

from collections.abc import Iterable, Iterator, Sequence


def find(text: str, stops: Sequence[str]) -> int | None:
    """Where the text ends: the index of the first stop string, None without one."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The pieces up to a stop string; what may become one is held back until it cannot.

    Joined, they are the text as `find` cuts it, however it was cut into pieces. No piece is asked
    for after the one that completes a stop string.

    Raises:
      ValueError: an empty stop string.
    """
    if not all(stops):
        raise ValueError(f"stop strings: got {list(stops)}, expected none that is empty")
    return _until(pieces, stops)


def _until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    held = ""
    for piece in pieces:
        held += piece
        end = find(held, stops)
        ready = len(held) - _begun(held, stops) if end is None else end
        if ready:
            yield held[:ready]
        if end is not None:
            return
        held = held[ready:]
    if held:
        yield held


def _begun(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of the text with which the longest unfinished stop string begins."""
    longest = max(map(len, stops), default=1) - 1
    sizes = range(min(longest, len(text)), 0, -1)
    return next((n for n in sizes if any(stop.startswith(text[-n:]) for stop in stops)), 0)
