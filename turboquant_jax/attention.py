"""Attention over a compressed cache, in the rotated space.

A chunk of T new tokens sees the cache as it stands, and itself, causally and in full precision;
only then is it appended. Decoding is the case T = 1, prefill any other, and the rule is one.

Each segment gives its normalised output and the log-sum-exp of its scores; `merge` joins segments,
and would join the splits of one device or the shards of many, by

    lse = logaddexp(lse_i),    o = sum_i exp(lse_i - lse) o_i.

Compressed blocks never leave the rotated space: <q, x~> = s <Pi q, c>, so the query is rotated once
and the output rotated back once (TurboQuant, arXiv:2504.19874; theory in the identities of its
section 3). The centre of the keys adds <q, mean> to every score of the compressed segment.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import tree
from jaxtyping import Array, Bool, Float, Int

from turboquant_jax import fused
from turboquant_jax.cache import appending
from turboquant_jax.cache import blocks as block_layout
from turboquant_jax.cache.appending import Implementation
from turboquant_jax.cache.codec import Codec
from turboquant_jax.cache.config import CacheConfig
from turboquant_jax.cache.state import Cache

Part = tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]


@dataclass(frozen=True)
class Scores:
    """How scores come from products: scale <q, k>, then soft-capped where `softcap` is given.

    Attributes:
      scale: multiplies every product; 1 / sqrt(head_dim) if None.
      softcap: c in c tanh(score / c), as Gemma uses it.
    """

    scale: float | None = None
    softcap: float | None = None

    def of(self, products: Float[Array, "..."], head_dim: int) -> Float[Array, "..."]:
        """Scores of float32 products."""
        scores = products * (head_dim**-0.5 if self.scale is None else self.scale)
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)


def attend(
    cache: Cache,
    layer: Int[Array, ""] | int,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    scores: Scores = Scores(),
    sink_logits: Float[Array, " N"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of T new tokens over the cache of a layer and over themselves.

    Args:
      cache: holds `lengths` tokens of each sequence; the new tokens are not in it yet.
      layer: which layer of the cache.
      q, k, v: of the new tokens, after RoPE; N query heads share K heads in groups of N / K.
        Rows of padding at the end of a chunk change nothing for the rows before them.
      scores: scale and soft cap.
      sink_logits: one learned logit per query head that takes part in the softmax without a value
        (GPT-OSS).
      implementation: "xla" is the definition, "pallas" the GPU kernel for the compressed blocks;
        None takes the kernel where the device has it and T = 1.

    Returns:
      The output in the dtype of q.

    Raises:
      ValueError: shapes that do not fit the cache, or an unknown implementation.
      NotImplementedError: an implementation that this device or call is not served by.
    """
    layer = jnp.asarray(layer, jnp.int32)
    check_shapes(cache.config, cache.lengths.shape[0], q, k, v)
    if _implementation(implementation, cache, q.shape[1]) == "xla":
        return _attend_xla(cache, layer, q, k, v, scores, sink_logits)
    return attend_pallas(cache, layer, q, k, v, scores, sink_logits)[0]


def attend_and_write(
    cache: Cache,
    layer: Int[Array, ""] | int,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    scores: Scores = Scores(),
    sink_logits: Float[Array, " N"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N H"], Cache]:
    """`attend`, then `cache.write` of the pending tokens, in one kernel where it is served.

    Between `cache.begin` and `cache.commit`; arguments and errors are those of `attend`.
    """
    layer = jnp.asarray(layer, jnp.int32)
    check_shapes(cache.config, cache.lengths.shape[0], q, k, v)
    if _implementation(implementation, cache, q.shape[1]) == "pallas":
        return attend_pallas(cache, layer, q, k, v, scores, sink_logits, write=True)
    # A single token overwrites nothing that is visible. Written first, it is written in place: with
    # the read first, XLA copies the whole window for every layer that is not part of a loop.
    if q.shape[1] == 1:
        cache = appending.write(cache, layer, k, v)
    output = _attend_xla(cache, layer, q, k, v, scores, sink_logits)
    return output, cache if q.shape[1] == 1 else appending.write(cache, layer, k, v)


def merge(parts: list[Part]) -> Part:
    """Join the outputs of disjoint sets of tokens by their log-sum-exp (-inf for an empty set)."""
    total = parts[0][1]
    for _, lse in parts[1:]:
        total = jnp.logaddexp(total, lse)
    output = jnp.zeros_like(parts[0][0])
    for part, lse in parts:
        # a part without tokens must not make NaN of -inf - (-inf), nor pass on what it holds
        weight = jnp.where(jnp.isneginf(lse), 0.0, jnp.exp(lse - total))
        output = output + weight[..., None] * jnp.where(jnp.isneginf(lse)[..., None], 0.0, part)
    return output, total


def attend_exact(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    visible: Bool[Array, "B T S"],
    scores: Scores,
    bias: Float[Array, "B T N"] | None = None,
) -> Part:
    """Softmax attention in float32, with the log-sum-exp; a query that sees nothing gives 0, -inf.

    `bias` is added to the products of a query before they are scaled.
    """
    batch, count, heads, dim = q.shape
    grouped = q.astype(jnp.float32).reshape(batch, count, k.shape[2], -1, dim)
    products = jnp.einsum("btkgh,bskh->bkgts", grouped, k.astype(jnp.float32))
    if bias is not None:
        by_group = jnp.moveaxis(bias.reshape(batch, count, k.shape[2], -1), 1, -1)
        products = products + by_group[..., None]
    logits = scores.of(products, dim)
    logits = jnp.where(visible[:, None, None], logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, initial=-jnp.inf)
    finite_top = jnp.where(jnp.isneginf(top), 0.0, top)
    weight = jnp.exp(logits - finite_top[..., None])
    total = jnp.sum(weight, axis=-1)
    # 0 * NaN is NaN: what nobody sees may be left over from another sequence
    seen = jnp.any(visible, axis=1)[..., None, None]
    output = jnp.einsum("bkgts,bskh->btkgh", weight, jnp.where(seen, v.astype(jnp.float32), 0.0))
    nonzero = jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, finite_top + jnp.log(nonzero), -jnp.inf)
    output = output / jnp.moveaxis(nonzero, -1, 1)[..., None]
    return output.reshape(q.shape), jnp.moveaxis(lse, -1, 1).reshape(batch, count, heads)


def _attend_xla(cache: Cache, layer, q, k, v, scores: Scores, sink_logits):
    """The definition that a kernel must equal."""
    parts = [_attend_recent(cache, layer, q, k, v, scores)]
    if cache.page_table.shape[1]:
        parts.append(_attend_blocks(cache, layer, q, scores))
    if sink_logits is not None:
        lse = jnp.broadcast_to(sink_logits.astype(jnp.float32), q.shape[:-1])
        parts.append((jnp.zeros(q.shape, jnp.float32), lse))
    return merge(parts)[0].astype(q.dtype)


def _attend_recent(cache: Cache, layer, q, k, v, scores: Scores) -> Part:
    """Sinks, window and the new tokens themselves: everything in full precision."""
    dtype = cache.config.dtype
    keys = [cache.sinks.keys[layer], cache.window.keys[layer], k.astype(dtype)]
    values = [cache.sinks.values[layer], cache.window.values[layer], v.astype(dtype)]
    config, lengths = cache.config, cache.lengths[:, None]
    query = lengths + jnp.arange(q.shape[1])[None, :]
    sink = jnp.arange(cache.sinks.keys.shape[2])[None, :] + jnp.zeros_like(lengths)
    slot = jnp.arange(cache.window.keys.shape[2])[None, :]
    newest = lengths - 1 - config.sinks
    ring = newest - (newest - slot) % max(slot.shape[1], 1) + config.sinks
    compressed = config.sinks + config.compressed_tokens(lengths)
    position = jnp.concatenate([sink, ring, query], axis=1)
    held = jnp.concatenate([sink < lengths, (ring >= compressed) & (ring >= 0), query >= 0], axis=1)
    visible = held[:, None, :] & sees(config, query, position)
    return attend_exact(q, jnp.concatenate(keys, 1), jnp.concatenate(values, 1), visible, scores)


def _attend_blocks(cache: Cache, layer, q, scores: Scores) -> Part:
    """The compressed blocks."""
    config, (key_codec, value_codec) = cache.config, cache.codecs
    table = jnp.maximum(cache.page_table, 0)
    pages = tree.map(lambda pool: pool[layer, table], cache.pool)  # [B, slots, K, ...]
    keys, values = block_layout.unpack(cache.codecs, pages)

    def by_token(vectors):  # [B, slots, K, T, H] -> [B, S, K, H]
        return jnp.moveaxis(vectors, 2, 3).reshape(
            table.shape[0], -1, config.num_kv_heads, config.head_dim
        )

    position, held = block_positions(cache)
    query = cache.lengths[:, None] + jnp.arange(q.shape[1])[None, :]
    output, lse = attend_exact(
        rotate_queries(key_codec, layer, q, config.num_kv_heads),
        by_token(key_codec.dequantize(keys)),
        by_token(value_codec.dequantize(values)),
        held[:, None, :] & sees(config, query, position),
        scores,
        mean_products(cache, layer, q),
    )
    return unrotate_outputs(value_codec, layer, output, config.num_kv_heads), lse


def attend_pallas(
    cache: Cache,
    layer: Int[Array, ""],
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "B 1 K H"],
    v: Float[Array, "B 1 K H"],
    scores: Scores,
    sink_logits: Float[Array, " N"] | None,
    *,
    write: bool = False,
    interpret: bool = False,
) -> tuple[Float[Array, "B 1 N H"], Cache]:
    """All segments in one fused kernel, for one query per sequence; `write` writes the token."""
    config = cache.config
    output, cache = fused.attend(
        cache,
        layer,
        q[:, 0],
        (k.astype(config.dtype), v.astype(config.dtype)),
        scale=config.head_dim**-0.5 if scores.scale is None else scores.scale,
        softcap=scores.softcap,
        sink_logits=sink_logits,
        write=write,
        interpret=interpret,
    )
    return output[:, None], cache


def block_positions(cache: Cache) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
    """Positions of the tokens in a sequence's slots of blocks, and which slots hold any."""
    config, slots = cache.config, cache.page_table.shape[1]
    last = config.num_blocks(cache.lengths)[:, None] - 1
    block = last - (last - jnp.arange(slots)[None, :]) % slots
    token = jnp.arange(config.block)[None, None, :]
    position = config.sinks + block[..., None] * config.block + token
    held = jnp.broadcast_to((block >= 0)[..., None], position.shape)
    return position.reshape(block.shape[0], -1), held.reshape(block.shape[0], -1)


def mean_products(cache: Cache, layer, q: Float[Array, "B T N H"]) -> Float[Array, "B T N"] | None:
    """<q, mean key>, which centring took from every compressed key; None without centring."""
    if cache.key_mean is None:
        return None
    grouped = _group(q.astype(jnp.float32), cache.config.num_kv_heads)
    return jnp.einsum("btkgh,bkh->btkg", grouped, cache.key_mean[layer]).reshape(q.shape[:-1])


def rotate_queries(codec: Codec, layer, q: Float[Array, "B T N H"], kv_heads: int):
    """Queries in the rotated space of the keys, float32."""
    return _ungroup(codec.rotate(layer, _heads_last(_group(q, kv_heads))), q)


def unrotate_outputs(codec: Codec, layer, output: Float[Array, "B T N H"], kv_heads: int):
    """Outputs back from the rotated space of the values."""
    return _ungroup(codec.unrotate(layer, _heads_last(_group(output, kv_heads))), output)


def sees(
    config: CacheConfig, query: Int[Array, "B T"], position: Int[Array, "B S"]
) -> Bool[Array, "B T S"]:
    """Which positions a query sees: causal, within the sliding window where there is one."""
    distance = query[:, :, None] - position[:, None, :]
    seen = distance >= 0
    return seen if config.sliding_window is None else seen & (distance < config.sliding_window)


def _implementation(
    implementation: Implementation | None, cache: Cache, queries: int
) -> Implementation:
    """What is to run: a name is obeyed or refused, None takes the kernel where it is served."""
    if implementation not in ("xla", "pallas", None):
        raise ValueError(f"implementation must be 'xla', 'pallas' or None, got {implementation!r}")
    if implementation == "xla":
        return "xla"
    reason = fused.unserved(cache, queries)
    if implementation == "pallas" and reason is not None:
        raise NotImplementedError(f"implementation='pallas' got {reason}")
    return "pallas" if reason is None else "xla"


def check_shapes(config: CacheConfig, batch: int, q, k, v) -> None:
    """ValueError unless queries, keys and values are new tokens of such a cache."""
    expected = (batch, q.shape[1], config.num_kv_heads, config.head_dim)
    if k.shape != expected or v.shape != expected:
        raise ValueError(f"keys and values must be {expected}, got {k.shape} and {v.shape}")
    if q.shape[0] != batch or q.shape[3] != config.head_dim or q.shape[2] % expected[2]:
        raise ValueError(
            f"queries must be ({batch}, T, N, {config.head_dim}) with N a multiple of "
            f"{config.num_kv_heads}, got {q.shape}"
        )


def _group(x: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "B T K G H"]:
    return x.reshape(*x.shape[:2], kv_heads, -1, x.shape[3])


def _heads_last(x: Float[Array, "B T K G H"]) -> Float[Array, "B T G K H"]:
    return jnp.swapaxes(x, 2, 3)


def _ungroup(x: Float[Array, "B T G K H"], like: Float[Array, "B T N H"]):
    return jnp.swapaxes(x, 2, 3).reshape(like.shape)
