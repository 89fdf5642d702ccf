"""Sizes of memory as people write them."""

import re
from fractions import Fraction

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_memory(text: str) -> int:
    """Bytes of "24GB" or "24G" (10^9 each), "24GiB" or "24Gi" (2^30), "1.5TB" or "1000000".

    Raises:
      ValueError: anything else, and less than one byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([kmgt]?)(i?)(b?)", text.strip().lower())
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"memory must be like 24GB (10^9) or 24GiB (2^30), got {text!r}")
    number, prefix, binary, _ = match.groups()
    count = int(Fraction(number) * (1024 if binary else 1000) ** _POWERS[prefix])
    if count < 1:
        raise ValueError(f"memory must be at least one byte, got {text!r}")
    return count
