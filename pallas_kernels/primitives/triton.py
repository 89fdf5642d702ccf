"""The only module that touches Pallas' Triton backend.

Triton is the backend because it serves sm_80 and newer and its kernels can be interpreted on a CPU.
jax deprecates it from 0.11 on without a removal date and says so (DeprecationWarning,
`DEPRECATION`) each time a kernel is lowered, which happens in the caller's `jit`; so the one place
that can silence it is the filter of the program, and the test configuration names this constant.

Under `interpreted` all that follows takes what a CPU has: inline assembly has no rule there, its
stand-in does.
"""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
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
ds = pl.ds

# Part of the key of every cache of jax, so that nothing traced for a CPU is taken for a GPU.
_interpreter = jax.make_user_context(default_value=False)


def interpreted(on: bool = True) -> AbstractContextManager[None]:
    """Kernels that are traced in this context run on any device, in Python."""
    return _interpreter(on)


def is_interpreted() -> bool:
    """Whether kernels are traced for that."""
    return _interpreter.value


# A look-up takes four neighbouring bytes from one thread. Those of a load are one thread's; those
# of a change of shape are under XLA's Triton, but not always under the one that torch ships.
_loading_again = jax.make_user_context(default_value=False)


def loading_again(on: bool = True) -> AbstractContextManager[None]:
    """Kernels that are traced in this context load what is looked up several times so often."""
    return _loading_again(on)


def loads_again() -> bool:
    """Whether kernels are traced for that."""
    return _loading_again.value


@dataclasses.dataclass(frozen=True)
class Launch:
    """The programs of a kernel: their grid, the warps of each, the stages of their loops' loads."""

    grid: tuple[int, ...]
    warps: int
    stages: int


def call(
    kernel: Callable[..., None],
    launch: Launch,
    *,
    in_specs: Any,
    out_specs: Any,
    out_shape: Any,
    name: str,
    aliases: dict[int, int] | None = None,
) -> Callable[..., Any]:
    """`pallas_call` pinned to Triton: without compiler parameters jax 0.10 would pick Mosaic.

    `aliases`: which flat input is overwritten by which flat output. Raises NotImplementedError for
    an output of 2**31 to 2**32 bytes that overwrites nothing.
    """
    aliases = aliases or {}

    def run(*operands: Any) -> Any:
        interpret = is_interpreted()
        leaves, specs = jax.tree.leaves(operands), jax.tree.leaves(in_specs)
        wide = [] if interpret else [i for i, x in enumerate(leaves) if _needs_64_bits(x)]
        for i in wide:
            specs[i] = _Wide(specs[i].block_shape, specs[i].index_map)
        overwritten = {aliases[i]: i for i in wide if i in aliases}
        for o, x in enumerate(jax.tree.leaves(out_shape)):
            if not interpret and _needs_64_bits(x) and o not in overwritten:
                raise NotImplementedError(f"{name}: a new array {x.shape} of 2**31 to 2**32 bytes")
        result = pl.pallas_call(
            _through_inputs(kernel, len(operands), overwritten) if overwritten else kernel,
            grid=launch.grid,
            in_specs=jax.tree.unflatten(jax.tree.structure(in_specs), specs),
            out_specs=out_specs,
            out_shape=out_shape,
            interpret=interpret,
            input_output_aliases=aliases,
            name=name,
            compiler_params=backend.CompilerParams(
                num_warps=launch.warps, num_stages=launch.stages
            ),
        )(*operands)
        if not all(specs[i].asked for i in wide):
            raise NotImplementedError(f"{name}: jax {jax.__version__} asks for no block mapping")
        return result

    return run


def _needs_64_bits(x: Any) -> bool:
    """Whether its last elements are beyond the offsets that the backend would compute.

    Those are signed 32-bit numbers of elements in arrays of up to 2**32 bytes, and 64-bit numbers
    in larger ones.
    """
    return x.size > 2**31 and x.size * x.dtype.itemsize <= 2**32


@dataclasses.dataclass
class _Wide(pl.BlockSpec):
    """Makes the backend take an array for one of more than 2**32 bytes.

    Only the length of the first axis is made up, which enters no offset. `asked` holds something
    once that was asked for, in copies of the block specification too.
    """

    asked: list[bool] = dataclasses.field(default_factory=list, kw_only=True)

    def to_block_mapping(self, origin: Any, array_aval: Any, **context: Any) -> Any:
        """That of the block in an array twice as long."""
        self.asked.append(True)
        mapping = super().to_block_mapping(origin, array_aval, **context)
        longer = (2 * array_aval.shape[0], *array_aval.shape[1:])
        return mapping.replace(array_aval=array_aval.update(shape=longer))


def _through_inputs(
    kernel: Callable[..., None], count: int, overwritten: dict[int, int]
) -> Callable[..., None]:
    """The kernel with inputs for the outputs that overwrite them: they are the same memory, and the

    length of an output cannot be made up.
    """

    def run(*refs: Any) -> None:
        inputs = jax.tree.leaves(refs[:count])
        outputs, structure = jax.tree.flatten(refs[count:])
        for o, i in overwritten.items():
            outputs[o] = inputs[i]
        kernel(*refs[:count], *jax.tree.unflatten(structure, outputs))

    return run


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


def barrier() -> None:
    """What the program has stored so far can be loaded from here on."""
    if not is_interpreted():
        backend.debug_barrier()


def exp2(x: jax.Array) -> jax.Array:
    """2**x in one instruction: `jnp.exp2` spends three more on denormal results."""
    if is_interpreted():
        return jnp.exp2(x)
    return assembly("ex2.approx.ftz.f32 $0, $1;", [x], "=f,f", 1, jnp.float32)


def fma(x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
    """x * y + z in float32 in one instruction: Triton as XLA runs it fuses none by itself."""
    shape = jnp.broadcast_shapes(x.shape, y.shape, z.shape)
    x, y, z = (jnp.broadcast_to(a, shape) for a in (x, y, z))
    if is_interpreted():
        return x * y + z
    return assembly("fma.rn.f32 $0, $1, $2, $3;", [x, y, z], "=f,f,f,f", 1, jnp.float32)


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """Float32 numbers rounded to a type of float32's exponents: XLA may skip that on its way."""
    if is_interpreted() and jnp.dtype(dtype) == jnp.bfloat16:
        x = lax.reduce_precision(x, 8, 7)
    return x.astype(dtype)


def fma_saturated(x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
    """x * y + z in float32, brought into [0, 1], in one instruction; NaN becomes 0."""
    shape = jnp.broadcast_shapes(x.shape, y.shape, z.shape)
    x, y, z = (jnp.broadcast_to(a, shape) for a in (x, y, z))
    if is_interpreted():
        total = x * y + z
        return jnp.where(total > 0, jnp.minimum(total, 1.0), 0.0)
    return assembly("fma.rn.sat.f32 $0, $1, $2, $3;", [x, y, z], "=f,f,f,f", 1, jnp.float32)


def tanh(x: jax.Array) -> jax.Array:
    """Hyperbolic tangent in one instruction, to 2**-11."""
    if is_interpreted():
        return jnp.tanh(x)
    return assembly("tanh.approx.f32 $0, $1;", [x], "=f,f", 1, jnp.float32)


def uniform(x: jax.Array) -> jax.Array:
    """An int32 scalar, as the compiler does not see by itself the same in all lanes of a warp.

    Behind a branch that might part them, every shuffle would be prepared for that.
    """
    if is_interpreted():
        return x
    first = "shfl.sync.idx.b32 $0, $1, 0, 31, -1;"
    return assembly(first, [jnp.full((1,), x)], "=r,r", 1, jnp.int32).max()


def in_lanes(x: jax.Array) -> jax.Array:
    """The int32 tensor [1, 1] itself, as the compiler does not see the same in all lanes of a warp.

    It keeps numbers that are in registers of a warp where registers are scarce, and copies them
    from there for each use.
    """
    if is_interpreted():
        return x
    zero = "mov.u32 y, %lanemask_eq; popc.b32 y, y; sub.u32 y, y, 1;"
    text = "{ .reg .b32 y; " + zero + " add.u32 $0, $1, y; }"
    return assembly(text, [x], "=r,r", 1, jnp.int32)


def hidden_zero(x: jax.Array) -> jax.Array:
    """An int32 0, of which the compiler only sees that it is made of this int32 scalar.

    With the counter of a loop in it, no address of the loop's loads waits in registers before it.
    """
    if is_interpreted():
        return jnp.zeros_like(x)
    return assembly("and.b32 $0, $1, 0;", [jnp.full((1,), x)], "=r,r", 1, jnp.int32).max()


def rare_loop(turns: int | jax.Array, body: Callable[[jax.Array, Any], Any], carry: Any) -> Any:
    """`lax.fori_loop` from 0, but its loads stay where they are, and nothing else does.

    Ahead of their use they would take registers, and all programs have as many as the most that one
    takes.
    """
    return lax.while_loop(
        lambda state: state[1] < turns,
        lambda state: (body(state[1], state[0]), state[1] + 1),
        (carry, jnp.int32(0)),
    )[0]


class Row:
    """A ref without the axes from `axis` on, as many as places, which only the program knows."""

    def __init__(self, ref: Any, *place: Any, axis: int = 0) -> None:
        self.ref, self.place, self.axis = ref, place, axis
        self.shape = (*ref.shape[:axis], *ref.shape[axis + len(place) :])
        self.dtype = ref.dtype

    def __getitem__(self, index: Any) -> jax.Array:
        """What lies there."""
        return self.ref[self._whole(index)]

    @property
    def at(self) -> Any:
        """Places there, for `load` and `store`."""
        return _At(self)

    def _whole(self, index: Any) -> tuple:
        index = index if isinstance(index, tuple) else (index,)
        return (*index[: self.axis], *self.place, *index[self.axis :])


@dataclasses.dataclass(frozen=True)
class _At:
    row: Row

    def __getitem__(self, index: Any) -> Any:
        return self.row.ref.at[self.row._whole(index)]


class Table:
    """A row of a table [rows, words] of float32, to be read at many places.

    Of up to 32 words each lane of a warp holds one, and a shuffle reads them, in one instruction;
    more are fetched from memory, where the length has to be a power of two.
    """

    def __init__(self, ref: Any, row: int, in_lanes: bool) -> None:
        self.ref, self.row, self.shuffled = ref, row, in_lanes and not is_interpreted()
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
