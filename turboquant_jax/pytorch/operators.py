"""The kernels as functions of torch tensors, and as operators of `torch.library`.

Arguments are those of the JAX kernels of the same names (`pallas_kernels`): tensors contiguous, in
the shapes and dtypes documented there, structures as `operands` has them. What a JAX call returns
as a new version of an argument is written in place here. Two differences: a layer is a view of the
tensors of all layers, which costs nothing in torch, so that `PagedBlocks.row` and
`ExactOperand.layer` stay None; and the default schedule has a power of two of splits, so that few
variants are compiled.

Every function can be captured in a CUDA graph once it ran, and holds under
`torch.compile(fullgraph=True)`. `bind` prepares a call for repeated launches of the same tensors.
On a CPU the JAX kernels run interpreted: exact, slow, and in need of jax.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from turboquant_jax.pytorch import runner
from turboquant_jax.pytorch.operands import Operand, flatten


@dataclass(frozen=True)
class Call:
    """What one call reads, writes and returns.

    Attributes:
      name: of the function of `plan_functions`.
      arguments: by the parameter names of that function.
      written: those tensors among them that are overwritten.
      outputs: new tensors, which are written whole.
    """

    name: str
    arguments: dict[str, Any]
    written: Sequence[torch.Tensor]
    outputs: tuple[torch.Tensor, ...]


class Operator:
    """A function of tensors that launches kernels."""

    def __init__(self, describe: Callable[..., Call]):
        functools.update_wrapper(self, describe)
        self.describe = describe
        self.run = _register(describe.__name__)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Runs the call on the current stream; returns its new tensors."""
        call = self.describe(*arguments, **named)
        spec, read, written = flatten(call.arguments, call.written)
        self.run(spec, read, written, list(call.outputs))
        return _returned(call.outputs)

    def bind(self, *arguments: Any, **named: Any) -> tuple[runner.Bound, Any]:
        """The call on these CUDA tensors, ready to be launched many times; its new tensors."""
        call = self.describe(*arguments, **named)
        spec, read, written = flatten(call.arguments, call.written)
        bound = runner.bind(call.name, spec, read, written, list(call.outputs))
        return bound, _returned(call.outputs)


def _returned(outputs: tuple[torch.Tensor, ...]) -> Any:
    if not outputs:
        return None
    return outputs[0] if len(outputs) == 1 else outputs


def _register(name: str) -> Callable[..., None]:
    """The operator `turboquant::name`: JSON of the call, tensors read, written to, and filled.

    All results are tensors that it is given, so that its fake has nothing to do.
    """

    def run(
        spec: str,
        read: list[torch.Tensor],
        written: list[torch.Tensor],
        outputs: list[torch.Tensor],
    ) -> None:
        runner.run(name, spec, read, written, outputs)

    mutated = ("written", "outputs")
    made = torch.library.custom_op(f"turboquant::{name}", run, mutates_args=mutated)
    made.register_fake(lambda spec, read, written, outputs: None)
    return made


@Operator
def decode_attention(
    query: torch.Tensor,
    blocks: Operand,
    softmax: Operand,
    *,
    exact: Operand | None = None,
    sketch: Operand | None = None,
    rotation: Operand | None = None,
    dtype: torch.dtype = torch.float32,
    schedule: Operand | None = None,
) -> Call:
    """One query token per sequence against its tokens: (output [B, N, H], log-sum-exp [B, N]).

    query [B, N, H]: rotated. blocks: PagedBlocks; softmax: Softmax; exact: ExactOperand, into
    whose keys and values, but the newest, the newest token is written if `exact.write`.
    """
    written: list[torch.Tensor] = []
    if exact is not None and exact.fields.get("write", False):
        written = [*exact.keys[:-1], *exact.values[:-1]]
    output = torch.empty(query.shape, dtype=dtype, device=query.device)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    arguments = dict(
        query=query, blocks=blocks, softmax=softmax, exact=exact, sketch=sketch, rotation=rotation,
        dtype=dtype, schedule=schedule,
    )  # fmt: skip
    return Call("decode_attention", arguments, written, (output, lse))


@Operator
def encode(keys: torch.Tensor, values: torch.Tensor, jobs: torch.Tensor, pool: Operand) -> Call:
    """Compress blocks of tokens into pages of the pool, in place: None.

    keys, values [rows, slots, K, H]; jobs int32 [jobs, 6]; pool: Pool, whose planes, scales,
    key_mean, rotated_mean and pre_rope.turned are written to. With a key_mean and no pre_rope, the
    pool's rotated_mean is `rotated_means(key_mean, keys)`.
    """
    written = [*pool.scales]
    for group in (*pool.keys, *pool.values):
        written += group.planes
    fields = pool.fields
    written += [fields[x] for x in ("key_mean", "rotated_mean") if fields.get(x) is not None]
    if fields.get("pre_rope") is not None:
        written.append(fields["pre_rope"].turned)
    arguments = dict(keys=keys, values=values, jobs=jobs, pool=pool)
    return Call("encode", arguments, written, ())


@Operator
def decode(
    pools: tuple[Operand, ...],
    pages: torch.Tensor,
    rows: torch.Tensor,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> Call:
    """Keys and values [jobs, T, heads, H] of some pages of some rows, in the rotated space.

    pools: one BlocksOperand; pages int32 [jobs]; rows int32 [heads].
    """
    (blocks,) = pools
    channels = sum(planes[0].shape[2] for planes in blocks.values)
    shape = (pages.shape[0], blocks.scales[0].shape[2], rows.shape[0], channels)
    keys, values = (torch.empty(shape, dtype=dtype, device=pages.device) for _ in range(2))
    arguments = dict(pools=pools, pages=pages, rows=rows, dtype=dtype)
    return Call("decode", arguments, (), (keys, values))


@Operator
def rotate(query: torch.Tensor, rotation: Operand) -> Call:
    """Queries [B, N, H] of 16 bits in the rotated space, float32, signs included."""
    output = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    return Call("rotate", dict(query=query, rotation=rotation), (), (output,))


@Operator
def rope_and_rotate(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotation: Operand
) -> Call:
    """RoPE of queries and keys of a projection [B, K, G + 2, H]: q, k, v and rotated q.

    cos, sin float32 [B, H/2]; rotated [B, K * G, H] is float32.
    """
    batch, kv_heads, group, channels = qkv.shape
    query, key = (batch, kv_heads * (group - 2), channels), (batch, kv_heads, channels)
    new = functools.partial(torch.empty, device=qkv.device)
    outputs = (*(new(x, dtype=qkv.dtype) for x in (query, key, key)), new(query))
    arguments = dict(qkv=qkv, cos=cos, sin=sin, rotation=rotation)
    return Call("rope_and_rotate", arguments, (), outputs)


@Operator
def trellis_encode(rows: torch.Tensor, levels: Sequence[float]) -> Call:
    """Indices uint8 [d, vectors] of the best trellis paths of float32 columns."""
    output = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    return Call("trellis_encode", dict(rows=rows, levels=tuple(levels)), (), (output,))


def rotated_means(key_mean: torch.Tensor, groups: Sequence[Operand]) -> torch.Tensor:
    """Mean keys [rows, K, H] in the rotated space over its gain, group by group, float32."""
    found, first = [], 0
    for group in groups:
        matrix = group.rotation.parts[:, 0].float().sum(dim=0)
        own = key_mean[..., first : first + matrix.shape[1]].float()
        found.append(torch.einsum("rkh,oh->rko", own, matrix))
        first += matrix.shape[1]
    return torch.cat(found, dim=-1)
