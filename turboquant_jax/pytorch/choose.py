"""What runs a call of the torch cache: the one place where it is held against what serves it.

On a GPU the library's kernels, through their operators, wherever they serve; else the definition.
On a CPU the kernels run only if they are asked for: interpreted, slow, and in need of jax. Reasons
are sentences, so that a refusal can say them.
"""

from typing import Literal

from torch import Tensor

from pallas_kernels.primitives.limits import MAX_FORMATS, MAX_HEADS, PAGE_TOKENS
from turboquant_jax.pytorch import codec, definition, updating
from turboquant_jax.pytorch.compression import DEFINITION, Compression
from turboquant_jax.pytorch.segments import Scores
from turboquant_jax.pytorch.state import State

Implementation = Literal["torch", "kernels"]
"""The definition, and our GPU kernels."""


def attend_and_write(
    state: State,
    layer: int,
    heads: tuple[Tensor, Tensor, Tensor],
    scores: Scores,
    sink_logits: Tensor | None,
    implementation: Implementation | None = None,
    *,
    empty: bool = False,
) -> Tensor:
    """Attention of queries, keys and values [B, T, heads, H], then `updating.write` of them.

    `empty`: whether the caller knows that the cache holds no tokens.

    Raises:
      ValueError: an unknown implementation, or keys and values of the wrong shape.
      NotImplementedError: kernels that do not serve this cache or call.
    """
    q, k, v = heads
    if _resolve(state, implementation, _why_not_attend(state, q)):
        from turboquant_jax.pytorch import kernels

        return kernels.attend_and_write(state, layer, heads, scores, sink_logits)
    window = state.config.sliding_window
    plain = scores.softcap is None and sink_logits is None
    if empty and plain and (window is None or window >= q.shape[1]):
        output = definition.attend_to_itself(q, k, v, scores)
    else:
        output = definition.attend(state, layer, q, k, v, scores, sink_logits)
    updating.write(state, layer, k, v, compression_of(state, below(implementation)))
    return output


def commit(state: State, rows: Tensor | None, implementation: Implementation | None = None) -> None:
    """`updating.commit`, by what serves; errors as those of `attend_and_write`."""
    updating.commit(state, rows, compression_of(state, implementation))


def compression_of(state: State, implementation: Implementation | None) -> Compression:
    """What compresses. Errors as those of `attend_and_write`."""
    if implementation == "torch":
        return DEFINITION
    if _resolve(state, implementation, _why_not_compress(state)):
        return Compression(kernels=True)
    if _resolve(state, None, _why_no_kernels(state)):
        from turboquant_jax.pytorch import kernels

        return Compression(search=kernels.trellis_search)
    return DEFINITION


def below(implementation: Implementation | None) -> Implementation | None:
    """What a call asks of the calls below it: nothing but the definition is contagious."""
    return "torch" if implementation == "torch" else None


def _resolve(state: State, asked: Implementation | None, reason: str | None) -> bool:
    """Whether kernels run, of which `reason` says why they do not serve."""
    if asked not in ("torch", "kernels", None):
        raise ValueError(f"implementation: got {asked!r}, expected 'torch', 'kernels' or None")
    if asked == "kernels" and reason is not None:
        raise NotImplementedError(f"implementation='kernels' got {reason}")
    if asked is None:
        return reason is None and state.device.type == "cuda"
    return asked == "kernels"


def _why_no_kernels(state: State) -> str | None:
    if state.device.type not in ("cuda", "cpu"):
        return f"a cache on {state.device.type!r}, served are 'cuda' and 'cpu'"
    return None


def _why_not_attend(state: State, q: Tensor) -> str | None:
    if (reason := _why_no_kernels(state)) is not None:
        return reason
    if q.shape[1] != 1:
        return f"{q.shape[1]} query tokens per sequence, served is 1"
    if q.shape[2] > MAX_HEADS * state.config.num_kv_heads:
        return f"{q.shape[2]} query heads, served are {MAX_HEADS} a kv head"
    if (count := max(map(len, state.members))) > MAX_FORMATS:
        return f"heads of {count} formats in a layer, served are {MAX_FORMATS}"
    if not state.layout.slots:
        return "a cache without blocks"
    if state.config.block not in PAGE_TOKENS:
        return f"blocks of {state.config.block} tokens, served are {PAGE_TOKENS}"
    groups = (g for part in state.parts for own in part.codecs for g in own.groups)
    if any(codec.grid_of(group) is None for group in groups):
        return "a codebook off the kernel's grid; use codebook='grid' or 'uniform'"
    return None


def _why_not_compress(state: State) -> str | None:
    if (reason := _why_no_kernels(state)) is not None:
        return reason
    if state.config.block not in PAGE_TOKENS:
        return f"blocks of {state.config.block} tokens, served are {PAGE_TOKENS}"
    if any(len(members) > 1 for members in state.members):
        return "heads of one layer in several formats"
    for own in (own for part in state.parts for own in part.codecs):
        if own.transform is not None:
            return "calibrated channels with one scale for all groups"
        if own.order is not None:
            return "channels in an order of their own"
        for group in own.groups:
            if group.constants.code != "scalar":
                return f"a {group.constants.code} code, served are scalar codes"
            if group.constants.dim % 8:
                return f"a group of {group.constants.dim} channels, served are multiples of 8"
    return None
