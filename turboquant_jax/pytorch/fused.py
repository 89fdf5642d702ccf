"""A decode step over the modules of a model, with few kernels between its matrices.

transformers runs a norm, a rotation by RoPE, a residual or an activation as up to ten kernels each,
which in a CUDA graph take longer than they move bytes. Here they are four functions, which
`torch.compile` makes one kernel each, once for all layers. Plain matrices that read one vector are
one product: their weights are put side by side, where the model's own parameters then are views
of them (`side_by_side`). Other modules are called as they are; layers themselves are not called.
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


def gate(xy: Tensor) -> Tensor:
    """SwiGLU's product of halves: other activations are refused where the model is described."""
    x, y = xy.chunk(2, dim=-1)
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
        h = layer.mlp.down_proj(by.gate(_products(h, [layer.mlp.gate_proj, layer.mlp.up_proj])))
        after = norms[index + 1]
        x, h = by.add_and_normalize(x, h, after.weight, after.variance_epsilon)
    return model.lm_head(h)


def _attention(
    module: Any, cache: Any, index: int, h: Tensor, angles: tuple[Tensor, Tensor], by: Between
) -> Tensor:
    matrices = [module.q_proj, module.k_proj, module.v_proj]
    heads = _products(h, matrices).unflatten(-1, (-1, module.head_dim))
    kv_heads, norms = cache.config.num_kv_heads, None
    q, k, v = heads.split([heads.shape[2] - 2 * kv_heads, kv_heads, kv_heads], dim=2)
    if hasattr(module, "q_norm"):
        weights = module.q_norm.weight, module.k_norm.weight
        norms = (*weights, module.q_norm.variance_epsilon)
    q, k = by.rotate(q, k, angles, norms)
    found = cache.attend(index, (q, k, v), None, Scores(module.scaling), None)
    return module.o_proj(found.flatten(2))


def _products(x: Tensor, modules: list[Any]) -> Tensor:
    """What the modules make of x [..., D], side by side."""
    if torch.compiler.is_compiling() or not _plain(modules):
        return torch.cat([module(x) for module in modules], dim=-1)
    weight, bias = (side_by_side(own) for own in _parameters(modules))
    assert weight is not None
    return torch.nn.functional.linear(x, weight, bias)


def _plain(modules: list[Any]) -> bool:
    """Whether these are matrices that nothing hooks onto."""
    return all(
        type(m) is torch.nn.Linear
        and not (m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m))
        for m in modules
    )


def _parameters(modules: list[Any]) -> tuple[list[Any], list[Any]]:
    return [m.weight for m in modules], [m.bias for m in modules]


def prepare(model: Any) -> None:
    """Put weights side by side, layer by layer, so that memory is needed twice for one at most."""
    for layer in supported.decoder(model).layers:
        own, mlp = layer.self_attn, layer.mlp
        for modules in ([own.q_proj, own.k_proj, own.v_proj], [mlp.gate_proj, mlp.up_proj]):
            if _plain(modules):
                for parameters in _parameters(modules):
                    side_by_side(parameters)
        if own.q_proj.weight.is_cuda:
            torch.cuda.empty_cache()  # what is free now is too small for the next layer's


@torch.inference_mode(False)
@torch.no_grad()
def side_by_side(parameters: list[Any]) -> Tensor | None:
    """Parameters as one tensor, of which they are views from the first call on; None for none."""
    first = parameters[0]
    if first is None:
        return None
    storage, place = first.untyped_storage().data_ptr(), first.data_ptr()
    for x in parameters:
        if x.untyped_storage().data_ptr() != storage or x.data_ptr() != place:
            break
        place += x.nbytes
    else:
        rows = sum(len(x) for x in parameters)
        return first.detach().as_strided((rows, *first.shape[1:]), first.stride())
    whole = torch.cat([x.detach() for x in parameters])
    for x, own in zip(parameters, whole.split([len(x) for x in parameters]), strict=True):
        x.data = own
    return whole
