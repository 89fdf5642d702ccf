"""Which implementation runs. A name is obeyed or refused; None takes the first that serves.

Whoever is called resolves the name once; what runs below is told the answer.
"""

from collections.abc import Mapping
from typing import Literal

import jax

from pallas_kernels.primitives import triton

Implementation = Literal["xla", "pallas", "cudnn"]
"""The definition, our GPU kernels, the vendor's attention."""


def resolve(
    asked: Implementation | None, reasons: Mapping[Implementation, str | None]
) -> Implementation:
    """What is to run, of the implementations that `reasons` names, fastest first.

    Args:
      asked: a name, or None.
      reasons: for each implementation why it does not serve, or None if it does.

    Raises:
      ValueError: a name that is not among them.
      NotImplementedError: a name that does not serve.
    """
    if asked is None:
        return next(name for name, reason in reasons.items() if reason is None)
    if asked not in reasons:
        names = ", ".join(repr(name) for name in sorted(reasons, reverse=True))
        raise ValueError(f"implementation: got {asked!r}, expected {names} or None")
    if reasons[asked] is not None:
        raise NotImplementedError(f"implementation={asked!r} got {reasons[asked]}")
    return asked


def no_gpu() -> str | None:
    """Why no kernel of ours runs here, or None if they do; interpreted ones run on any device."""
    backend = jax.default_backend()
    if backend == "gpu" or triton.is_interpreted():
        return None
    return f"the backend {backend!r}, served is 'gpu'"
