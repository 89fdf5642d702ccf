"""Every key of a file's metadata is read, is known not to touch the computation, or is refused.

The ValueError names the key, what it held and what was expected.
"""

from collections.abc import Collection, Mapping
from typing import Any


def require_served(
    entries: Mapping[str, Any],
    served: Mapping[str, tuple[Any, ...]],
    known: Collection[str],
    prefix: str = "",
) -> None:
    """Refuse an unserved value of a key that matters, and a key nobody here knows (null is off)."""
    for key, value in entries.items():
        if key in served and value not in served[key]:
            expected = " or ".join(repr(v) for v in served[key] if v is not None) or "null"
            raise ValueError(f"{prefix}{key}: got {value!r}, expected {expected}")
        if key not in served and key not in known and value is not None:
            raise ValueError(
                f"{prefix}{key}: got {value!r}, expected no such key: "
                "it is unknown here and may change the computation"
            )


def require_wide(entries: Mapping[str, Any], key: str, context: str, prefix: str = "") -> None:
    """A window as long as the context hides nothing; ValueError for a shorter one."""
    window, longest = entries.get(key), entries.get(context)
    if window and not (type(window) is type(longest) is int and window >= longest):
        raise ValueError(
            f"{prefix}{key}: got {window!r}, expected none below the context of {longest!r} tokens"
        )


def get(entries: Mapping[str, Any], key: str, prefix: str = "") -> Any:
    """The value of a key; ValueError without one."""
    if entries.get(key) is None:
        raise ValueError(f"{prefix}{key}: got nothing, expected a value")
    return entries[key]


def exact_quotient(hidden: Any, heads: Any) -> int:
    """Channels per head where the file does not say; both must be plain integers."""
    if not (type(hidden) is int and type(heads) is int and heads > 0 and hidden % heads == 0):
        raise ValueError(f"got {heads!r} heads, expected a divisor of hidden size {hidden!r}")
    return hidden // heads
