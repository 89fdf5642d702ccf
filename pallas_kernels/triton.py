"""The only module that touches Pallas' Triton backend.

Triton is the backend because it serves sm_80 and newer and its kernels can be interpreted on a CPU.
jax deprecates it from 0.11 on without a removal date and says so (DeprecationWarning,
`DEPRECATION`) each time a kernel is lowered, which happens in the caller's `jit`; so the one place
that can silence it is the filter of the program, and the test configuration names this constant.

Everything here takes `interpret`: inline assembly has no rule on a CPU, its stand-in does.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as backend

# Threads of a warp.
LANES = 32

DEPRECATION = "The Pallas Triton backend is deprecated"

load = backend.load
store = backend.store
program_id = pl.program_id
when = pl.when
BlockSpec = pl.BlockSpec


def call(
    kernel: Callable[..., None],
    *,
    grid: tuple[int, ...],
    in_specs: Any,
    out_specs: Any,
    out_shape: Any,
    warps: int,
    stages: int,
    name: str,
    interpret: bool,
    aliases: dict[int, int] | None = None,
) -> Callable[..., Any]:
    """`pallas_call` pinned to Triton: without compiler parameters jax 0.10 would pick Mosaic."""
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        interpret=interpret,
        input_output_aliases=aliases or {},
        name=name,
        compiler_params=backend.CompilerParams(num_warps=warps, num_stages=stages),
    )


def assembly(
    text: str, arguments: Sequence[jax.Array], constraints: str, pack: int, dtype: Any
) -> jax.Array:
    """Inline PTX with one result of the arguments' shape (several results are broken in jax)."""
    result = jax.ShapeDtypeStruct(arguments[0].shape, dtype)
    return backend.elementwise_inline_asm(
        text,
        args=list(arguments),
        constraints=constraints,
        pack=pack,
        result_shape_dtypes=[result],
    )[0]


def barrier(interpret: bool) -> None:
    """Each thread of a program sees what the others have stored so far."""
    if not interpret:
        backend.debug_barrier()


def exp2(x: jax.Array, interpret: bool) -> jax.Array:
    """2**x in one instruction: `jnp.exp2` spends three more on denormal results."""
    if interpret:
        return jnp.exp2(x)
    return assembly("ex2.approx.ftz.f32 $0, $1;", [x], "=f,f", 1, jnp.float32)


def fma(x: jax.Array, y: jax.Array, z: jax.Array, interpret: bool) -> jax.Array:
    """x * y + z in float32 in one instruction: Triton as XLA runs it fuses none by itself."""
    shape = jnp.broadcast_shapes(x.shape, y.shape, z.shape)
    x, y, z = (jnp.broadcast_to(a, shape) for a in (x, y, z))
    if interpret:
        return x * y + z
    return assembly("fma.rn.f32 $0, $1, $2, $3;", [x, y, z], "=f,f,f,f", 1, jnp.float32)


def fma_saturated(x: jax.Array, y: jax.Array, z: jax.Array, interpret: bool) -> jax.Array:
    """x * y + z in float32, brought into [0, 1], in one instruction; NaN becomes 0."""
    shape = jnp.broadcast_shapes(x.shape, y.shape, z.shape)
    x, y, z = (jnp.broadcast_to(a, shape) for a in (x, y, z))
    if interpret:
        total = x * y + z
        return jnp.where(total > 0, jnp.minimum(total, 1.0), 0.0)
    return assembly("fma.rn.sat.f32 $0, $1, $2, $3;", [x, y, z], "=f,f,f,f", 1, jnp.float32)


def tanh(x: jax.Array, interpret: bool) -> jax.Array:
    """Hyperbolic tangent in one instruction, to 2**-11."""
    if interpret:
        return jnp.tanh(x)
    return assembly("tanh.approx.f32 $0, $1;", [x], "=f,f", 1, jnp.float32)


def uniform(x: jax.Array, interpret: bool) -> jax.Array:
    """An int32 scalar, as the compiler does not see by itself the same in all lanes of a warp.

    Behind a branch that might part them, every shuffle would be prepared for that.
    """
    if interpret:
        return x
    first = "shfl.sync.idx.b32 $0, $1, 0, 31, -1;"
    return assembly(first, [jnp.full((1,), x)], "=r,r", 1, jnp.int32).max()


class Table:
    """A row of a table [rows, words] of float32, to be read at many places.

    Of up to 32 words each lane of a warp holds one, and a shuffle reads them, in one instruction;
    more are fetched from memory, where the length has to be a power of two.
    """

    def __init__(self, ref: Any, row: int, in_lanes: bool, interpret: bool) -> None:
        self.ref, self.row, self.shuffled = ref, row, in_lanes and not interpret
        if self.shuffled:
            lane = assembly(
                "mov.u32 $0, %laneid;", [jnp.zeros((1, 1), jnp.int32)], "=r,r", 1, jnp.int32
            )
            # one element, of which each lane has a value of its own
            self.words = load(ref.at[row, lane])

    def __getitem__(self, index: jax.Array) -> jax.Array:
        """The words at integers of any shape, of which the low bits count."""
        if not self.shuffled:
            return load(self.ref.at[self.row, index & (self.ref.shape[1] - 1)])
        words = jnp.broadcast_to(self.words, index.shape)
        return assembly(
            "shfl.sync.idx.b32 $0, $1, $2, 31, -1;", [words, index], "=f,f,r", 1, jnp.float32
        )


def dot(a: jax.Array, b: jax.Array, *, b_axis: int) -> jax.Array:
    """int8 [M, C] times int8 b, contracted over b's axis `b_axis`, in exact int32."""
    return lax.dot_general(a, b, (((1,), (b_axis,)), ((), ())), preferred_element_type=jnp.int32)


def float_dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """Product of two matrices of one floating type, in float32 without rounding the operands."""
    return lax.dot_general(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
