"""Several new tokens of one request over its past: compressed pages are decoded a tile at a time.

A tile is read once by torch's own attention and dropped. Parts are joined by their log-sum-exp.
"""

import torch
from torch import Tensor

from turboquant_jax.pytorch import pre_rope
from turboquant_jax.pytorch.codec import Codec
from turboquant_jax.pytorch.pre_rope import Phases
from turboquant_jax.pytorch.segments import SegmentPart, merge

PAGES = 64
"""Pages of a tile: one shape, so one program decodes all."""


def attend(q: Tensor, k: Tensor, v: Tensor, factor: float, *, causal: bool = False) -> SegmentPart:
    """Softmax attention of q [T, N, H] over k, v [S, K, H], in their dtype; output in float32.

    With `causal`, S = T and a token sees those before it and itself.
    """
    aten, group = torch.ops.aten, q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    heads = [x.transpose(0, 1)[None] for x in (q, k, v)]
    if q.device.type == "cpu":
        run = aten._scaled_dot_product_flash_attention_for_cpu
        output, lse = run(*heads, 0.0, causal, scale=factor)
    elif q.dtype == torch.float32:  # the flash kernels are for 16 bits
        run = aten._scaled_dot_product_efficient_attention
        output, lse = run(*heads, None, True, 0.0, causal, scale=factor)[:2]
    else:
        run = aten._scaled_dot_product_flash_attention
        output, lse = run(*heads, 0.0, causal, scale=factor)[:2]
    return output[0].transpose(0, 1).float(), lse[0, :, : q.shape[0]].transpose(0, 1)


def join(parts: list[SegmentPart]) -> SegmentPart:
    """The parts as one."""
    return parts[0] if len(parts) == 1 else merge(parts)


def with_mean(
    keys: Tensor, mean: Tensor, phases: Phases | None, codec: Codec, first: int
) -> Tensor:
    """Rotated keys [S, K, H], tokens from `first` on, and the mean [K, H] that they lack."""
    index = first + torch.arange(keys.shape[0], dtype=torch.int32, device=keys.device)
    taken = pre_rope.mean_at(mean, phases, index)
    return (keys.float() + codec.rotate_query(slice(None), taken)).to(keys.dtype)


def rotated(codec: Codec, q: Tensor, heads: int) -> Tensor:
    """Queries [T, N, H] in the rotated space of the keys, in their dtype."""
    grouped = q.unflatten(1, (heads, -1)).transpose(1, 2)
    found = codec.rotate_query(slice(None), grouped)
    return found.transpose(1, 2).flatten(1, 2).to(q.dtype)


def unrotated(codec: Codec, output: Tensor, heads: int) -> Tensor:
    """Outputs [T, N, H] back from the rotated space of the values, float32."""
    grouped = output.unflatten(1, (heads, -1)).transpose(1, 2)
    return codec.unrotate(slice(None), grouped).transpose(1, 2).flatten(1, 2)
