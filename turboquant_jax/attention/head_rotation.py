"""Queries into the rotated space of the keys, outputs back from that of the values, head by head.

Of a layer whose heads have several formats, each function is given the queries of those that share
one: `pick_queries` takes them out, `join_heads` puts the results together.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from turboquant_jax.attention.segments import SegmentPart
from turboquant_jax.cache import pre_rope
from turboquant_jax.cache.codec import Codec
from turboquant_jax.cache.state import Cache, LayerRows, Rows

MemberPart = tuple[Float[Array, "B T _ H"], Float[Array, "B T _"]]
"""A `SegmentPart` of the queries of one member."""


def mean_products(
    cache: Cache,
    rows: LayerRows,
    member: Rows,
    q: Float[Array, "B T N H"],
    position: Int[Array, "B S"],
) -> Float[Array, "B T N _"] | None:
    """<q, R_p m>, which centring took from the compressed keys at these positions, as one number
    where it is the same at all of them; None without centring.
    """
    if cache.key_mean is None:
        return None
    mean = member.pick(cache.key_mean[rows.layer], axis=1)
    index = position[:, :1] if cache.phases is None else position
    taken = pre_rope.mean_at(mean, cache.phases, index - cache.config.sinks)
    grouped = _group(q.astype(jnp.float32), mean.shape[1])
    return jnp.einsum("btkgh,bskh->btkgs", grouped, taken).reshape(*q.shape[:-1], -1)


def rotate_queries(
    codec: Codec, rows: Int[Array, " K"], q: Float[Array, "B T N H"]
) -> Float[Array, "B T N H"]:
    """Queries of the heads in these rows in the rotated space of the keys, float32."""
    return _ungroup(codec.rotate_query(rows, _heads_last(_group(q, rows.shape[0]))), q)


def unrotate_outputs(
    codec: Codec, rows: Int[Array, " K"], output: Float[Array, "B T N H"]
) -> Float[Array, "B T N H"]:
    """Outputs of the heads in these rows back from the rotated space of the values."""
    return _ungroup(codec.unrotate(rows, _heads_last(_group(output, rows.shape[0]))), output)


def rotate_by_member(
    rotate: Callable[..., Float[Array, "B T _ H"]],
    rows: LayerRows,
    codecs: Sequence[Codec],
    x: Float[Array, "B T N H"],
    kv_heads: int,
) -> Float[Array, "B T N H"]:
    """`rotate(codec, rows, x)` of the heads of each member, by its codec."""
    found = [
        _group(rotate(codec, own, pick_queries(member, x, kv_heads)), own.shape[0])
        for codec, member in zip(codecs, rows.members, strict=True)
        for own in (member.of(kv_heads),)
    ]
    return rows.join(found, axis=2).reshape(x.shape)


def pick_queries(
    member: Rows, q: Float[Array, "B T N H"], kv_heads: int
) -> Float[Array, "B T _ H"]:
    """Those of the kv heads of a member."""
    picked = member.pick(_group(q, kv_heads), axis=2)
    return picked.reshape(*q.shape[:2], -1, q.shape[3])


def join_heads(rows: LayerRows, parts: Sequence[MemberPart], kv_heads: int) -> SegmentPart:
    """Outputs and log-sum-exps of the members' queries, as all queries of the layer."""

    def joined(xs: Sequence[Float[Array, "B T _ ..."]]) -> Float[Array, "B T N ..."]:
        grouped = [
            x.reshape(*x.shape[:2], kv_heads if m.heads is None else len(m.heads), -1, *x.shape[3:])
            for x, m in zip(xs, rows.members, strict=True)
        ]
        whole = rows.join(grouped, axis=2)
        return whole.reshape(*whole.shape[:2], -1, *whole.shape[4:])

    output, lse = zip(*parts, strict=True)
    return joined(output), joined(lse)


def _group(x: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "B T K G H"]:
    return x.reshape(*x.shape[:2], kv_heads, -1, x.shape[3])


def _heads_last(x: Float[Array, "B T K G H"]) -> Float[Array, "B T G K H"]:
    return jnp.swapaxes(x, 2, 3)


def _ungroup(
    x: Float[Array, "B T G K H"], like: Float[Array, "B T N H"]
) -> Float[Array, "B T N H"]:
    return jnp.swapaxes(x, 2, 3).reshape(like.shape)
