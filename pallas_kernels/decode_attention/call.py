"""Decode attention over blocks of compressed keys and values: the call.

Everything lives in the rotated space: the queries come rotated, the output is to be rotated back.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.decode_attention import deal
from pallas_kernels.decode_attention.combine import combine
from pallas_kernels.decode_attention.exact import ExactOperand, check_exact
from pallas_kernels.decode_attention.inputs import (
    PagedBlocks,
    Sketch,
    Softmax,
    check,
    check_rotation,
)
from pallas_kernels.decode_attention.kernel import decode_kernel
from pallas_kernels.decode_attention.plan import make_decode_plan, schedule_of
from pallas_kernels.decode_attention.schedule import Schedule
from pallas_kernels.decode_attention.scores import DecodePlan
from pallas_kernels.primitives import triton
from pallas_kernels.primitives.blocks import BlocksOperand, flat
from pallas_kernels.primitives.period import PERIOD
from pallas_kernels.primitives.rotation import RotationOperand


def decode_attention(
    q: Float[Array, "B N H"],
    blocks: PagedBlocks,
    softmax: Softmax,
    *,
    exact: ExactOperand | None = None,
    sketch: Sketch | None = None,
    rotation: RotationOperand | None = None,
    dtype: DTypeLike = jnp.float32,
    schedule: Schedule | None = None,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N"], ExactOperand | None]:
    """One query token per sequence against its tokens: output, log-sum-exp, `exact` as it is then.

    q [B, N, H]: rotated queries; N a multiple of the K kv heads, at most 32 times as many. The
    log-sum-exp is in nats, -inf for a sequence of no tokens, whose output is 0; parts merge by it.
    Queries and probabilities enter the products as 15-bit integers, levels are exact and sums are
    float32 or exact.

    `exact`: further tokens, in full precision; returned with the newest written where it says, in
    place if the caller gives the arrays away. Then `exact.places` says which tokens of the blocks
    are seen, and `blocks.lengths` are whatever it takes. `rotation`, of the values: its transpose
    multiplies the output of the blocks, so that it leaves the rotated space, where those of
    `exact` never were; without it everything is in one space. The output has `dtype`, the
    log-sum-exp float32.

    Raises ValueError for shapes that do not fit, NotImplementedError for what the kernel does not
    serve.
    """
    batch, heads, channels = q.shape
    kv_heads = check(q, blocks)
    if exact is not None:
        check_exact(exact, batch, heads, kv_heads)
    if rotation is not None:
        check_rotation(rotation, kv_heads, channels)
    per_head = heads // kv_heads
    if schedule is None:
        schedule = schedule_of(blocks, exact, kv_heads, per_head)
    if sketch is not None and len(blocks.pools) > 1:
        raise NotImplementedError("heads of several formats with a sketch")
    # the loops of several formats leave no registers for it
    dealt = len(blocks.pools) == 1 and deal.dealt(batch, kv_heads, schedule)
    plans = tuple(
        make_decode_plan(
            pool, sketch, softmax, schedule, (batch, per_head), exact=exact is not None, dealt=dealt
        )
        for pool in blocks.pools
    )
    plan = plans[0]
    if exact is not None and exact.phases is not None and plan.pages * plan.tokens % PERIOD:
        raise ValueError(
            f"tiles: got {plan.pages} pages of {plan.tokens} tokens, expected a multiple of "
            f"{PERIOD} tokens where the mean turns"
        )
    grouped = lambda x: x.reshape(batch, kv_heads, per_head, *x.shape[2:])  # noqa: E731
    inputs: dict[str, Any] = {
        "queries": [grouped(q)] + ([grouped(sketch.query)] if sketch else []),
        **_of_pools(blocks.pools, plans, sketch),
        "page_table": blocks.page_table,
        "lengths": blocks.lengths,
    }
    if blocks.heads is not None:
        inputs["heads"] = blocks.heads.astype(jnp.int32)
    if exact is not None:
        inputs["exact"] = dataclasses.replace(exact, query=grouped(exact.query))
    layer = None if exact is None else exact.layer
    if layer is not None or blocks.row is not None:  # side by side: one read
        numbers = [0 if x is None else x for x in (blocks.row, layer)]
        inputs["place"] = jnp.stack([jnp.asarray(x, jnp.int32) for x in numbers])
    parts, stored = run(plans, inputs, kv_heads, channels)
    sinks = None
    if softmax.sink_logits is not None:
        sinks = softmax.sink_logits.astype(jnp.float32).reshape(kv_heads, per_head)
    out, lse = combine(parts, plan.splits, sinks, rotation, per_head, dtype)
    if exact is not None and stored is not None:
        exact = dataclasses.replace(
            exact,
            keys=(*stored[0], exact.keys[-1]),
            values=(*stored[1], exact.values[-1]),
        )
    return out.reshape(q.shape), lse.reshape(batch, heads), exact


def _of_pools(
    pools: tuple[BlocksOperand, ...], plans: tuple[DecodePlan, ...], sketch: Sketch | None
) -> dict[str, list]:
    """The inputs that each pool has of its own, by name."""
    signs = [] if sketch is None else [(flat(sketch.signs),)]
    norms = [] if sketch is None else [flat(sketch.norms)]
    return {
        "keys": [[tuple(map(flat, x)) for x in pool.keys] + signs for pool in pools],
        "values": [[tuple(map(flat, x)) for x in pool.values] for pool in pools],
        "scales": [[*map(flat, pool.scales), *norms] for pool in pools],
        "bases": [[*map(flat, pool.bases)] for pool in pools],
        "key_tables": [[group.decoder.tables() for group in plan.key_groups] for plan in plans],
        "value_tables": [[x.tables() for x in plan.value_decoders] for plan in plans],
    }


def run(
    plans: tuple[DecodePlan, ...], inputs: dict[str, Any], kv_heads: int, channels: int
) -> tuple[dict[str, Any], tuple | None]:
    """Calls the kernel on the grid (splits, kv heads, sequences).

    What is of one sequence is passed of all, as a program finds its own (`deal`). So is what is of
    one head where heads have several formats, for which the grid is (splits, sequences, heads):
    multiprocessors are to run one format after the other, since the code of two does not fit in
    their instruction caches.
    """
    plan = plans[0]
    batch, columns = plan.batch, plan.columns
    several = len(plans) > 1
    grid = (plan.splits, batch, kv_heads) if several else (plan.splits, kv_heads, batch)

    def shared(x):
        return triton.BlockSpec(x.shape, lambda i, h, j: (0,) * x.ndim)

    def of_head(x):  # [B, K, ...], of all sequences
        return triton.BlockSpec(
            (x.shape[0], None, *x.shape[2:]), lambda i, h, j: (0, h) + (0,) * (x.ndim - 2)
        )

    def of_slots(x):  # [K, ...]
        return triton.BlockSpec((None, *x.shape[1:]), lambda i, h, j: (h,) + (0,) * (x.ndim - 1))

    def segment(x):  # of one kv head, whatever the row
        return triton.BlockSpec(
            (*x.shape[:-2], None, x.shape[-1]), lambda i, h, j: (0,) * (x.ndim - 2) + (h, 0)
        )

    if several:
        of_head = of_slots = segment = shared

    in_specs = {
        name: jax.tree.map(of_head if name == "queries" else shared, value)
        for name, value in inputs.items()
        if name != "exact"
    }
    shapes = {"peak": (columns,), "weight": (columns,), "sums": (channels, columns)}
    slots = deal.slots(batch, plan.splits, plan.dealt)
    new = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    out_shape: dict[str, Any] = {
        name: new(kv_heads, slots, *shape) for name, shape in shapes.items()
    }
    if plan.dealt:
        out_shape["dealt"] = jax.ShapeDtypeStruct((kv_heads, batch, 2), jnp.int32)
    out_specs: dict[str, Any] = {name: of_slots(x) for name, x in out_shape.items()}
    if "exact" in inputs:
        exact = inputs["exact"]
        in_specs["exact"] = ExactOperand(
            query=of_head(exact.query),
            keys=tuple(segment(x) for x in exact.keys),
            values=tuple(segment(x) for x in exact.values),
            pending=shared(exact.pending),
            places=exact.places,
            key_mean=None if exact.key_mean is None else segment(exact.key_mean),
            phases=jax.tree.map(shared, exact.phases),
            write=exact.write,
            queries=exact.queries,
            later=exact.later,
        )
        inputs = inputs | {"exact": dataclasses.replace(exact, layer=None)}
        out_shape["exact"] = {name: new(batch, kv_heads, *shape) for name, shape in shapes.items()}
        out_specs["exact"] = jax.tree.map(of_head, out_shape["exact"])
        if exact.write:
            for name in ("keys", "values"):
                stored = getattr(exact, name)[:-1]
                out_specs[name] = tuple(segment(x) for x in stored)
                out_shape[name] = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in stored)
    inputs = jax.tree.map(jnp.asarray, inputs)
    outputs = triton.call(
        lambda inputs, outputs: decode_kernel(inputs, outputs, plans=plans),
        triton.Launch(grid, warps=plan.warps, stages=plan.stages),
        in_specs=(in_specs,),
        out_specs=out_specs,
        out_shape=out_shape,
        aliases=_aliases(inputs, out_shape),
        name="decode_attention",
    )(inputs)
    stored = (outputs.pop("keys"), outputs.pop("values")) if "keys" in outputs else None
    return outputs, stored


def _aliases(inputs: dict[str, Any], outputs: dict[str, Any]) -> dict[int, int]:
    """Which flat input is overwritten by which flat output: the segments that are written to."""
    if "keys" not in outputs:
        return {}

    def places(tree: Any, root: str, field: str) -> list[int]:
        paths = [
            jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)
        ]
        return [i for i, path in enumerate(paths) if path.startswith(f"{root}{field}[")]

    return {
        i: o
        for name in ("keys", "values")
        for i, o in zip(
            places(inputs, "['exact']", f".{name}"), places(outputs, "", f"['{name}']"),
            strict=False,  # but for the segment of the newest token
        )
    }  # fmt: skip
