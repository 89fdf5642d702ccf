"""What runs a call of the torch cache: the one place where it is held against what serves it.

On a GPU the library's kernels, through their operators, wherever they serve; else the definition.
Reasons are sentences, so that a refusal can say them.
"""

import importlib.util
from typing import Literal

from torch import Tensor

from turboquant_jax.pytorch import definition, updating
from turboquant_jax.pytorch.segments import Scores
from turboquant_jax.pytorch.state import State

Implementation = Literal["torch", "kernels"]
"""The definition, and our GPU kernels."""


def choose(state: State, queries: int, implementation: Implementation | None) -> Implementation:
    """What attends to `queries` new tokens a sequence.

    Raises:
      ValueError: an unknown implementation.
      NotImplementedError: kernels that do not serve this cache or call.
    """
    if implementation not in ("torch", "kernels", None):
        raise ValueError(
            f"implementation: got {implementation!r}, expected 'torch', 'kernels' or None"
        )
    if implementation == "torch":
        return "torch"
    reason = _why_no_kernels(state, queries)
    if reason is None:
        return "kernels"
    if implementation == "kernels":
        raise NotImplementedError(f"implementation='kernels' got {reason}")
    return "torch"


def _why_no_kernels(state: State, queries: int) -> str | None:
    """Why the kernel does not attend, or None if it does."""
    if state.device.type != "cuda":
        return f"a cache on {state.device.type!r}, served is 'cuda'"
    if importlib.util.find_spec("turboquant_jax.pytorch.operators") is None:
        return "an installation without operators"
    if queries != 1:
        return f"{queries} query tokens per sequence, served is 1"
    return None


def attend_and_write(
    state: State,
    layer: int,
    heads: tuple[Tensor, Tensor, Tensor],
    scores: Scores,
    sink_logits: Tensor | None,
    implementation: Implementation | None = None,
) -> Tensor:
    """Attention of queries, keys and values [B, T, heads, H], then `updating.write` of them."""
    q, k, v = heads
    if choose(state, q.shape[1], implementation) == "kernels":
        from turboquant_jax.pytorch import kernels

        return kernels.attend_and_write(state, layer, heads, scores, sink_logits)
    output = definition.attend(state, layer, q, k, v, scores, sink_logits)
    updating.write(state, layer, k, v)
    return output


def commit(state: State, rows: Tensor | None) -> None:
    """`updating.commit`."""
    updating.commit(state, rows)
