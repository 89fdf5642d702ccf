"""A decode step over the modules of a model, with few kernels between its matrices.

transformers runs a norm, a rotation by RoPE, a residual or an activation as up to ten kernels each,
which in a CUDA graph take longer than they move bytes. Here they are four functions, which
`torch.compile` makes one kernel each, once for all layers. Matrices, embeddings and the head are
the model's own modules; layers themselves are not called.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from turboquant_jax.pytorch import supported
from turboquant_jax.pytorch.segments import Scores


def normalize(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The RMS norm of x [..., D], as transformers rounds it."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + epsilon)
    return weight * wide.to(x.dtype)


def add_and_normalize(
    x: Tensor, y: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """x + y, and its norm."""
    x = x + y
    return x, normalize(x, weight, epsilon)


def rotate(
    q: Tensor, k: Tensor, angles: tuple[Tensor, Tensor], norms: tuple[Any, ...] | None
) -> tuple[Tensor, Tensor]:
    """RoPE of q, k [B, 1, heads, H] by cosines and sines [B, 1, 1, H].

    `norms`: weights of the norms of q and k before it, and their epsilon; None without.
    """
    cos, sin = angles
    if norms is not None:
        q, k = (normalize(x, weight, norms[2]) for x, weight in zip((q, k), norms, strict=False))

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    return turned(q), turned(k)


def gate(x: Tensor, y: Tensor) -> Tensor:
    """SwiGLU's product: other activations are refused where the model is described."""
    return torch.nn.functional.silu(x) * y


class Between(NamedTuple):
    """What runs between the matrices."""

    normalize: Callable[..., Any] = normalize
    add_and_normalize: Callable[..., Any] = add_and_normalize
    rotate: Callable[..., Any] = rotate
    gate: Callable[..., Any] = gate


@functools.cache
def compiled() -> Between:
    """By `torch.compile`, one kernel each."""
    return Between(*(torch.compile(x, fullgraph=True, dynamic=False) for x in Between()))


def check(model: Any) -> None:
    """ValueError unless the step here is that of a model."""
    if not hasattr(model, "lm_head"):
        raise ValueError(
            f"model: got {type(model).__name__}, expected one for causal language modeling"
        )


def step(model: Any, cache: Any, ids: Tensor, positions: Tensor, by: Between) -> Tensor:
    """Logits [B, 1, V] of one token [B, 1] a sequence, as `model.forward` finds them."""
    own = supported.decoder(model)
    x = own.embed_tokens(ids)
    cos, sin = own.rotary_emb(x, positions)
    angles = cos[:, :, None], sin[:, :, None]
    norms = [layer.input_layernorm for layer in own.layers] + [own.norm]
    h = by.normalize(x, norms[0].weight, norms[0].variance_epsilon)
    for index, layer in enumerate(own.layers):
        h = _attention(layer.self_attn, cache, index, h, angles, by)
        after = layer.post_attention_layernorm
        x, h = by.add_and_normalize(x, h, after.weight, after.variance_epsilon)
        h = layer.mlp.down_proj(by.gate(layer.mlp.gate_proj(h), layer.mlp.up_proj(h)))
        after = norms[index + 1]
        x, h = by.add_and_normalize(x, h, after.weight, after.variance_epsilon)
    return model.lm_head(h)


def _attention(
    module: Any, cache: Any, index: int, h: Tensor, angles: tuple[Tensor, Tensor], by: Between
) -> Tensor:
    matrices = module.q_proj, module.k_proj, module.v_proj
    q, k, v = (matrix(h).unflatten(-1, (-1, module.head_dim)) for matrix in matrices)
    norms = None
    if hasattr(module, "q_norm"):
        weights = module.q_norm.weight, module.k_norm.weight
        norms = (*weights, module.q_norm.variance_epsilon)
    q, k = by.rotate(q, k, angles, norms)
    found = cache.attend(index, (q, k, v), None, Scores(module.scaling), None)
    return module.o_proj(found.flatten(2))
