"""Packages whose names are loaded when they are first used (PEP 562), so that importing is free."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def names(
    package: str, table: Mapping[str, tuple[str, str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of `package`.

    Args:
      package: its `__name__`.
      table: of each public name, the module that has it and what it is called there.
    """

    def load(name: str) -> Any:
        if name not in table:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, attribute = table[name]
        value = getattr(importlib.import_module(module), attribute)
        setattr(sys.modules[package], name, value)  # not asked for again
        return value

    return load, lambda: sorted(table)
