"""Shapes are checked while tests run: what jaxtyping calls for each function of the library."""

import re
import sys
from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_
from types import FrameType, UnionType
from typing import Any, Union, get_args, get_origin

import jax
import jaxtyping
import numpy as np
from beartype import beartype
from jax.experimental import pallas
from jaxtyping import AbstractArray

LIBRARY = ("turboquant_jax", "pallas_kernels")
# What JAX takes for an array, and what stands for one that is not there.
ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
# Of the kernels the calls and what they take. Their bodies see blocks and references, which have
# no shapes to annotate: the hook would only slow down their tracing. In the way of torch's own
# tracing it would be, so that its tensors have no annotations either.
CHECKED = (
    "turboquant_jax.attention",
    "turboquant_jax.cache",
    "turboquant_jax.cli",
    "turboquant_jax.models",
    "turboquant_jax.quantizers",
    "pallas_kernels.decode.call",
    "pallas_kernels.decode_attention.call",
    "pallas_kernels.decode_attention.inputs",
    "pallas_kernels.decode_attention.recent",
    "pallas_kernels.encode.call",
    "pallas_kernels.encode.pool",
    "pallas_kernels.primitives.blocks",
    "pallas_kernels.primitives.rotation",
    "pallas_kernels.rope.call",
    "pallas_kernels.trellis.call",
)


def install() -> None:
    """Before anything imports `CHECKED`.

    jaxtyping's decorator binds the arguments of every call, arrays or not: a checkpoint is read by
    hundreds of thousands of calls. Functions and dataclasses without a hint of an array stay bare.
    """
    decorator = jaxtyping.jaxtyped

    def of_arrays_alone(*, typechecker: Callable) -> Callable:
        def decorate(made: Any) -> Any:
            hints = getattr(
                made.__init__ if isinstance(made, type) else made, "__annotations__", {}
            )
            if any(isinstance(x, str) or of_arrays(x) is not None for x in hints.values()):
                return decorator(typechecker=typechecker)(made)
            return made

        return decorate

    jaxtyping.jaxtyped = of_arrays_alone
    jaxtyping.install_import_hook(CHECKED, "tests.shapes.check")


def check(function: Callable) -> Callable:
    """Beartype, of arrays alone, after the call: the library's own refusals come first.

    jaxtyping makes one function that takes the arguments, for before the call, and one that takes
    the result as well, for after it. Names and numbers the library refuses itself. A pytree is
    checked where the library makes one: JAX fills it with whatever it maps over or stacks, and for
    a kernel its fields are blocks.
    """
    after = any(re.fullmatch(r"ret\d+", name) for name in function.__code__.co_varnames)
    hints = {name: of_arrays(hint) for name, hint in function.__annotations__.items()}
    function.__annotations__ = {name: hint for name, hint in hints.items() if hint is not None}
    if not after or not function.__annotations__:
        return function
    checked = beartype(function)
    if function.__name__ != "__init__":
        return checked

    def check_fields(*args: Any, **kwargs: Any) -> None:
        leaves = jax.tree.leaves((args[1:], kwargs))
        if made_by_library() and not any(isinstance(leaf, pallas.BlockSpec) for leaf in leaves):
            checked(*args, **kwargs)

    return check_fields


def of_arrays(hint: Any) -> Any:
    """The hint with all `ARRAYS` in the place of JAX's; None if it is of no arrays."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is None:
        if not (isinstance(hint, type) and issubclass(hint, AbstractArray)):
            return None
        if hint.array_type is not jax.Array:
            return hint
        return hint.dtype[reduce(or_, ARRAYS), hint.dim_str]
    if origin not in (Union, UnionType, tuple, list, Sequence):
        return None
    found = [of_arrays(argument) for argument in arguments]
    if all(x is None for x in found):
        return None
    found = [
        (Any if origin is tuple and argument is not ... else argument) if x is None else x
        for x, argument in zip(found, arguments, strict=True)
    ]
    if origin in (Union, UnionType):
        return reduce(or_, found)
    return origin[tuple(found)]


def made_by_library() -> bool:
    """Whether the library's code calls the constructor that is being checked."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "").partition(".")[0]
        if module not in ("jaxtyping", "dataclasses"):
            return module in LIBRARY
        frame = frame.f_back
    return False
