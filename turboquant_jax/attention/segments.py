"""Attention over one segment of tokens, and the rule that joins segments.

Each segment gives its normalised output and the log-sum-exp of its scores; `merge` joins segments,
and would join the splits of one device or the shards of many, by

    lse = logaddexp(lse_i),    o = sum_i exp(lse_i - lse) o_i.

What is not finite is never lost. In every implementation the output of a query head is NaN

- in all channels if its query, a key that it sees, or the mean of those keys holds NaN or infinity,
  or if its sink logit is NaN or +infinity;
- in a channel if a value that it sees is NaN or infinite there, whatever its share is. A compressed
  value that holds NaN or infinity has lost which of its channels did, and counts in all of them.

A score that overflows float32 makes NaN of it too, or what exact arithmetic would, as no share of
one far below the others; never another number. What a query does not see changes no bit.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from turboquant_jax.cache.layout import Share

SegmentPart = tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]


@dataclass(frozen=True)
class Scores:
    """How scores come from products: scale <q, k>, then soft-capped where `softcap` is given.

    Attributes:
      scale: multiplies every product; 1 / sqrt(head_dim) if None.
      softcap: c in c tanh(score / c), as Gemma uses it.
    """

    scale: float | None = None
    softcap: float | None = None

    def factor(self, head_dim: int) -> float:
        """What multiplies the products."""
        return head_dim**-0.5 if self.scale is None else self.scale

    def of(self, products: Float[Array, "..."], head_dim: int) -> Float[Array, "..."]:
        """Scores of float32 products."""
        scores = products * self.factor(head_dim)
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)


PLAIN = Scores()
"""Scaled by 1 / sqrt(head_dim), without a cap."""


def merge(parts: list[SegmentPart]) -> SegmentPart:
    """Join the outputs of disjoint sets of tokens by their log-sum-exp (-inf for an empty set)."""
    if len(parts) == 1:
        return parts[0]
    total = parts[0][1]
    for _, lse in parts[1:]:
        total = jnp.logaddexp(total, lse)
    output = jnp.zeros(parts[0][0].shape, jnp.float32)
    for part, lse in parts:
        # a part without tokens must not make NaN of -inf - (-inf), nor pass on what it holds
        weight = jnp.where(jnp.isneginf(lse), 0.0, jnp.exp(lse - total))
        seen = jnp.where(jnp.isneginf(lse)[..., None], 0.0, part.astype(jnp.float32))
        output = output + weight[..., None] * seen
    return output, total


def over_shares(part: SegmentPart, share: Share | None) -> SegmentPart:
    """`merge` of what every share of the sequences gives, on all of them, in one collective."""
    if share is None:
        return part
    output, lse = part
    both = jnp.concatenate([output.astype(jnp.float32), lse[..., None]], axis=-1)
    every = lax.all_gather(both, share.axis)
    return merge([(every[i, ..., :-1], every[i, ..., -1]) for i in range(share.count)])


def attend_segment(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    visible: Bool[Array, "B T S"],
    scores: Scores,
    bias: Float[Array, "B T N _"] | None = None,
) -> SegmentPart:
    """Softmax attention in float32, with the log-sum-exp; a query that sees nothing gives 0, -inf.

    `bias` is added to the products of queries before they are scaled: with each of the S tokens its
    own, or with all of them the one.
    """
    batch, count, heads, dim = q.shape
    grouped = q.astype(jnp.float32).reshape(batch, count, k.shape[2], -1, dim)
    products = jnp.einsum("btkgh,bskh->bkgts", grouped, k.astype(jnp.float32))
    if bias is not None:
        by_group = bias.reshape(batch, count, k.shape[2], -1, bias.shape[3])
        products = products + jnp.moveaxis(by_group, 1, 3)
    logits = scores.of(products, dim)
    # even -inf: where a sum overflows on its way, the sign is not that of the score
    logits = jnp.where(jnp.isfinite(products) & jnp.isfinite(logits), logits, jnp.nan)
    logits = jnp.where(visible[:, None, None], logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, initial=-jnp.inf)
    finite_top = jnp.where(jnp.isneginf(top), 0.0, top)
    weight = jnp.exp(logits - finite_top[..., None])
    total = jnp.sum(weight, axis=-1)
    # 0 * NaN is NaN: of what a query does not see, nothing may enter its sum
    finite = jnp.isfinite(v)
    clean = jnp.where(finite, v.astype(jnp.float32), 0.0)
    output = jnp.einsum("bkgts,bskh->btkgh", weight, clean)
    seen = jnp.einsum(
        "bts,bskh->btkh", visible.astype(jnp.float32), 1.0 - finite.astype(jnp.float32)
    )
    empty = total == 0  # not of NaN
    nonzero = jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -jnp.inf, finite_top + jnp.log(nonzero))
    output = output / jnp.moveaxis(nonzero, -1, 1)[..., None]
    output = jnp.where(seen[:, :, :, None] > 0, jnp.nan, output)
    return output.reshape(q.shape), jnp.moveaxis(lse, -1, 1).reshape(batch, count, heads)


def sink_part(sink_logits: Float[Array, " N"], shape: tuple[int, ...]) -> SegmentPart:
    """Sinks as a part of an output of this shape [B, T, N, H]: a score for each head, no value."""
    lse = jnp.broadcast_to(sink_logits.astype(jnp.float32), shape[:-1])
    return jnp.zeros(shape, jnp.float32), lse
