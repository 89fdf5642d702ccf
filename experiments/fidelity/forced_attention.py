"""Attention of teacher forcing as one GPU kernel: no scores of a whole text in memory.

What it computes is the library's `attend_split`: query p sees the tokens [sinks, edge(p)) as they
come back from compression and all others up to itself in full precision. Products are in
TensorFloat-32, sums and the softmax in float32.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from experiments.fidelity.rule import Rule
from pallas_kernels.primitives import triton
from turboquant_jax.cache.layout import edge

_QUERIES, _KEYS = 128, 64  # of a tile
_LOG2E = 1.4426950408889634


def forced_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    approximate_k: Float[Array, "B T K H"],
    approximate_v: Float[Array, "B T K H"],
    rule: Rule,
) -> Float[Array, "B T N H"]:
    """Outputs in float32.

    Args:
      q: the queries.
      k, v: what is seen in full precision, in 16 or 32 bits.
      approximate_k, approximate_v: what is seen of the compressed tokens, in 16 or 32 bits.
      rule: window, sinks and block as arrays, in tokens.

    Raises:
      ValueError: texts that are no whole tiles of 128 queries.
    """
    batch, count, heads, dim = q.shape
    numbers = jnp.stack([rule.window, rule.sinks, rule.block])
    if count % _QUERIES:
        raise ValueError(f"texts must be multiples of {_QUERIES} tokens, got {count}")
    per_head = heads // k.shape[2]
    # the contracted axis last, in both products: tokens of the values
    queries = (q.astype(jnp.float32) * (_LOG2E * dim**-0.5)).swapaxes(1, 2)
    keys = [x.swapaxes(1, 2) for x in (k, approximate_k)]
    values = [jnp.moveaxis(x, 1, 3) for x in (v, approximate_v)]

    def of_queries() -> triton.BlockSpec:
        return triton.BlockSpec((None, None, _QUERIES, dim), lambda i, n, b: (b, n, i, 0))

    def of_head(*shape: int) -> triton.BlockSpec:
        return triton.BlockSpec((None, None, *shape), lambda i, n, b: (b, n // per_head, 0, 0))

    out = triton.call(
        _kernel,
        triton.Launch((count // _QUERIES, heads, batch), warps=8, stages=2),
        in_specs=[
            triton.BlockSpec((3,), lambda i, n, b: (0,)),
            of_queries(),
            *[of_head(count, dim)] * 2,
            *[of_head(dim, count)] * 2,
        ],
        out_specs=of_queries(),
        out_shape=jax.ShapeDtypeStruct(queries.shape, jnp.float32),
        name="forced_attention",
    )(numbers, queries, *keys, *values)
    return out.swapaxes(1, 2)


def _kernel(numbers, query, exact_k, near_k, exact_v, near_v, out) -> None:
    rule: Any = Rule(*(numbers[i] for i in range(3)))  # C(L) as of a CacheConfig
    sinks = rule.sinks
    first = triton.program_id(0) * _QUERIES
    row = first + lax.broadcasted_iota(jnp.int32, (_QUERIES, 1), 0)
    column = lax.broadcasted_iota(jnp.int32, (1, _KEYS), 1)

    q, end = query[...], edge(rule, row)

    def turn(i, carry, whole: bool):
        out, top, total = carry
        at = lax.mul(i, jnp.int32(_KEYS))
        key, value = (_keys(near_k, at), _values(near_v, at))
        scores = _dot(q, key)
        if not whole:
            position = at + column
            held = (position >= sinks) & (position < end)
            exact = jnp.where(position <= row, _dot(q, _keys(exact_k, at)), -jnp.inf)
            scores = jnp.where(held, scores, exact)
        highest = jnp.maximum(top, jnp.max(scores, axis=1))
        weight = triton.exp2(scores - highest[:, None])
        fade = triton.exp2(top - highest)
        out = out * fade[:, None]
        if whole:
            out += _dot(weight, value)
        else:
            out += _dot(jnp.where(held, weight, 0.0), value)
            out += _dot(jnp.where(held, 0.0, weight), _values(exact_v, at))
        return out, highest, total * fade + jnp.sum(weight, axis=1)

    # the sinks' tiles, those that every query of this tile sees compressed, and the rest
    last = (first + _QUERIES) // _KEYS
    begin = jnp.minimum((sinks + _KEYS - 1) // _KEYS, last)
    middle = jnp.maximum(begin, edge(rule, first) // _KEYS)
    carry = (
        jnp.zeros(q.shape, jnp.float32),
        jnp.full(_QUERIES, -jnp.inf, jnp.float32),
        jnp.zeros(_QUERIES, jnp.float32),
    )
    mixed, whole = partial(turn, whole=False), partial(turn, whole=True)
    carry = lax.fori_loop(jnp.int32(0), begin, mixed, carry)
    carry = lax.fori_loop(begin, middle, whole, carry)
    made, _, total = lax.fori_loop(middle, last, mixed, carry)
    out[...] = made / total[:, None]


def _keys(ref, at):
    return triton.load(ref.at[triton.ds(at, _KEYS), :]).astype(jnp.float32)


def _values(ref, at):
    return triton.load(ref.at[:, triton.ds(at, _KEYS)]).astype(jnp.float32)


def _dot(a, b):
    """[M, C] times [N, C] transposed; a CPU has no TensorFloat-32."""
    rough = lax.DotAlgorithmPreset.TF32_TF32_F32
    return lax.dot_general(
        a,
        b,
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST if triton.is_interpreted() else rough,
        preferred_element_type=jnp.float32,
    )
