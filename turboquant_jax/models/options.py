"""What is asked of a generation: plain data, known without JAX."""

import dataclasses
import math
from numbers import Integral, Real
from typing import Any


def _number(name: str, value: Any, kind: type, expected: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ValueError(f"{name}: got {value!r}, expected {expected}")
    return value


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to draw from logits, and which tokens end an answer; static under `jax.jit`.

    A temperature of 0 is greedy. A row stops after one of `eos_ids`.

    The filters act in the order of the fields: logits are divided by `temperature`, the `top_k`
    largest are kept (of equal ones the lower ids), and of these the smallest set of most probable
    tokens whose probability reaches `top_p`. Raises ValueError for values without a meaning, a
    filter of greedy draws among them.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self):
        temperature = _number("temperature", self.temperature, Real, "a number >= 0")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature: got {temperature}, expected a number >= 0")
        object.__setattr__(self, "temperature", float(temperature))
        if self.top_k is not None:
            top_k = _number("top_k", self.top_k, Integral, "an integer >= 1")
            if top_k < 1:
                raise ValueError(f"top_k: got {top_k}, expected an integer >= 1")
            object.__setattr__(self, "top_k", int(top_k))
        if self.top_p is not None:
            top_p = _number("top_p", self.top_p, Real, "a number in (0, 1]")
            if not 0 < top_p <= 1:
                raise ValueError(f"top_p: got {top_p}, expected a number in (0, 1]")
            object.__setattr__(self, "top_p", float(top_p))
        for name in ("top_k", "top_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}: got {getattr(self, name)} with a temperature of 0, which takes the "
                    "most probable token, expected a temperature above 0"
                )


GREEDY = Sampling()
"""The most probable token, always."""
