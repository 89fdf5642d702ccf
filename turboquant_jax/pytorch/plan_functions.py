"""The calls that plans are made of: functions of flat lists of arrays, by the text of a call.

`operands.flatten` wrote that text. Its operands become those of `pallas_kernels` by their names, so
that these say what is wrong with shapes, dtypes and fields.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pallas_kernels.decode
import pallas_kernels.decode_attention
import pallas_kernels.encode
import pallas_kernels.rope
import pallas_kernels.trellis
from pallas_kernels.decode_attention.plan import schedule_of
from turboquant_jax.attention.kernel_call import exact_places
from turboquant_jax.cache.config import CacheConfig
from turboquant_jax.cache.layout import Layout

MODULES = (
    pallas_kernels.decode_attention,
    pallas_kernels.encode,
    pallas_kernels.decode,
    pallas_kernels.rope,
)


def function_of(name: str, spec: str) -> Callable[[Sequence[Any], Sequence[Any]], tuple]:
    """`function(read, written)` -> (new arrays, arrays as they are then in place of `written`).

    Of a written array that the call does not return, that is None.
    """
    if name not in FUNCTIONS:
        raise ValueError(f"call: got {name!r}, expected one of {', '.join(FUNCTIONS)}")
    arguments = json.loads(spec)

    def function(read: Sequence[Any], written: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        arrays = {"read": read, "written": written}
        built = {name: _built(value, arrays) for name, value in arguments.items()}
        outputs, after = FUNCTIONS[name](**built)
        stored: list[Any] = [None] * len(written)
        for argument, value in after.items():
            _collect(arguments[argument], value, stored)
        return outputs, stored

    return function


def _built(value: Any, arrays: dict[str, Sequence[Any]]) -> Any:
    """What a JSON value stands for."""
    if isinstance(value, list):
        return tuple(_built(x, arrays) for x in value)
    if not isinstance(value, dict):
        return value
    if "kind" not in value:
        ((which, i),) = value.items()
        return arrays[which][i]
    fields = {name: _built(x, arrays) for name, x in value["fields"].items()}
    return _class(value["kind"])(**fields)


def _collect(value: Any, result: Any, into: list[Any]) -> None:
    """Puts the leaves of `result` into the places that `value` has for them."""
    if isinstance(value, list):
        for x, y in zip(value, result, strict=True):
            _collect(x, y, into)
    elif isinstance(value, dict) and "kind" in value:
        for name, x in value["fields"].items():
            if hasattr(result, name):
                _collect(x, getattr(result, name), into)
    elif isinstance(value, dict) and "written" in value:
        into[value["written"]] = result


def _class(kind: str) -> Callable[..., Any]:
    if kind == "Places":
        return _places
    for module in MODULES:
        if kind in module.__all__:
            return getattr(module, kind)
    raise ValueError(f"operand: got {kind!r}, expected one that `pallas_kernels` has")


def _places(
    sink_slots: int, ring: int, slots: int, **rule: Any
) -> Callable[[Any, Any], pallas_kernels.decode_attention.ExactPlaces]:
    config = CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, **rule)
    return partial(exact_places, Layout(config, sink_slots, ring, slots))


def _decode_attention(query, blocks, softmax, exact, schedule, **options) -> tuple[list, dict]:
    if schedule is None:
        schedule = _schedule(query, blocks, exact)
    output, lse, exact = pallas_kernels.decode_attention.decode_attention(
        query, blocks, softmax, exact=exact, schedule=schedule, **options
    )
    return [output, lse], {"exact": exact}


def _schedule(query, blocks, exact) -> pallas_kernels.decode_attention.Schedule:
    """The default one, but a power of two of splits: few variants, and none that spills.

    As many programs for 4 bits as for fewer: for half as many, XLA gives a thread 130 registers and
    torch's Triton 247, or it spills. So a fused step of Llama-3-8B at 8 x 32,768 once took 17.6 ms
    on an H100, and 10.6 with these. And every sequence has its splits, whatever the lengths: splits
    by length take registers too, and under torch's Triton no GPU has timed them.
    """
    kv_heads = blocks.kv_heads
    if kv_heads is None:
        rows = blocks.pools[0].scales[0] if blocks.heads is None else blocks.heads
        kv_heads = rows.shape[0]
    found = schedule_of(blocks, exact, kv_heads, query.shape[1] // kv_heads, "usual")
    return replace(found, splits=1 << (found.splits.bit_length() - 1), dealt=False)


def _encode(keys, values, jobs, pool) -> tuple[list, dict]:
    return [], {"pool": pallas_kernels.encode.encode(keys, values, jobs, pool)}


def _decode(**arguments) -> tuple[list, dict]:
    return list(pallas_kernels.decode.decode(**arguments)), {}


def _rotate(query, rotation) -> tuple[list, dict]:
    return [pallas_kernels.rope.rotate(query, rotation)], {}


def _rope_and_rotate(**arguments) -> tuple[list, dict]:
    return list(pallas_kernels.rope.rope_and_rotate(**arguments)), {}


def _trellis_encode(rows, levels) -> tuple[list, dict]:
    return [pallas_kernels.trellis.encode(rows, levels)], {}


FUNCTIONS: dict[str, Callable[..., tuple[list, dict]]] = {
    "decode_attention": _decode_attention,
    "encode": _encode,
    "decode": _decode,
    "rotate": _rotate,
    "rope_and_rotate": _rope_and_rotate,
    "trellis_encode": _trellis_encode,
}
