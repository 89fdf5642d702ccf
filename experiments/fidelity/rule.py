"""Which tokens are compressed when, in numbers or arrays of them: the library's rule of place."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from turboquant_jax.cache import CacheConfig


@register_dataclass
@dataclass(frozen=True)
class Rule:
    """Window, sinks and block as of `CacheConfig`, which gives the rule; numbers, or arrays.

    `centred` and `pre_rope`: whether keys are, and by their mean before the rotary embedding.
    """

    window: Any
    sinks: Any
    block: Any
    centred: Any = False
    pre_rope: Any = False

    compressed_tokens = CacheConfig.compressed_tokens  # C(L), no second definition
    sliding_window = None

    def arrays(self) -> "Rule":
        """The same rule as arrays, on which nothing is specialised."""
        return jax.tree.map(lambda value: jnp.asarray(int(value), jnp.int32), self)
