"""Which outputs are spoilt by what is not finite, beside an attention that is given none of it.

The rule is that of `segments`: of a key all channels are spoilt, of a value the own.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from turboquant_jax.cache import blocks
from turboquant_jax.cache.state import Cache, LayerRows, Rows

Seen = tuple[Float[Array, "B T K"], Bool[Array, "B T K H"]]
"""Of all tokens that each query sees: the largest reach of a key, which values are not finite."""


def reach(x: Float[Array, "*batch H"]) -> Float[Array, "*batch"]:
    """The largest magnitude of each vector, infinity if it holds NaN or infinity; float32."""
    largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1)
    return jnp.where(jnp.isfinite(largest), largest, jnp.inf)


def clean(keys: Float[Array, "B S K H"], values: Float[Array, "B S K H"]):
    """Both, finite; the reach of the keys [B, S, K], and where values were not finite."""
    largest, bad = reach(keys), ~jnp.isfinite(values)
    keys = jnp.where(jnp.isfinite(largest)[..., None], keys, 0)
    return keys, jnp.where(bad, 0, values), largest, bad


def seen_so_far(
    reach: Float[Array, "B T K"],
    bad: Bool[Array, "B T K H"],
    past_reach: Float[Array, "B K"] | None = None,
    past_bad: Bool[Array, "B K H"] | None = None,
) -> Seen:
    """Of queries that see a chunk up to their own token, and the whole past, if one is given."""
    token = jnp.arange(bad.shape[1])[None, :, None, None]
    largest = lax.cummax(reach, axis=1)
    found = token >= jnp.min(jnp.where(bad, token, bad.shape[1]), axis=1, keepdims=True)
    if past_reach is None or past_bad is None:
        return largest, found
    return jnp.maximum(largest, past_reach[:, None]), found | past_bad[:, None]


def seen_in_window(
    window: int,
    reach: Float[Array, "B T K"],
    bad: Bool[Array, "B T K H"],
    past_reach: Float[Array, "B S K"] | None = None,
    past_bad: Bool[Array, "B S K H"] | None = None,
) -> Seen:
    """Of queries that see the newest `window` tokens, the own one included.

    The past are the S < `window` tokens before the chunk, the newest first; none if not given. In
    pieces of `window` tokens a query sees its own piece up to itself, and of the piece before it
    what is behind its own place there.
    """
    count = reach.shape[1]
    pieces = -(-count // window)

    def split(new, past):
        """[B, pieces + 1, window, ...]: the past's piece first."""
        before = 0 if past is None else past.shape[1]
        joined = new if past is None else jnp.concatenate([past[:, ::-1], new], axis=1)
        edges = (window - before, pieces * window - count)
        joined = jnp.pad(joined, [(0, 0), edges, *[(0, 0)] * (new.ndim - 2)])
        return joined.reshape(new.shape[0], pieces + 1, window, *new.shape[2:])

    def whole(x):
        return x.reshape(x.shape[0], pieces * window, *x.shape[3:])[:, :count]

    reach, bad = split(reach, past_reach), split(bad, past_bad)
    behind = lax.cummax(reach[:, :-1, 1:], axis=2, reverse=True)
    behind = jnp.pad(behind, [(0, 0), (0, 0), (0, 1), (0, 0)])
    largest = jnp.maximum(lax.cummax(reach[:, 1:], axis=2), behind)
    place = jnp.arange(window)[None, None, :, None, None]
    first = jnp.min(jnp.where(bad[:, 1:], place, window), axis=2, keepdims=True)
    last = jnp.max(jnp.where(bad[:, :-1], place, -1), axis=2, keepdims=True)
    return whole(largest), whole((place >= first) | (place < last))


def reach_of_blocks(cache: Cache, rows: LayerRows) -> Float[Array, "B K"]:
    """Of the compressed keys that are seen in the rotated space; infinity if a value is coded so.

    What a query's largest magnitude may be multiplied by on its way there is counted in here.
    """
    tokens, table = cache.layout.compressed_tokens(cache.lengths), cache.table.page_table

    def of_member(member: Rows) -> Float[Array, "B K"]:
        part, own = cache.parts[member.part], member.of(cache.kv_heads)
        place = own[:, None, None], jnp.maximum(table, 0)[None]
        pages = jax.tree.map(lambda x: x[place], part.pool)
        keys = blocks.largest_key(part.codecs[0], pages)
        keys = keys.reshape(*keys.shape[:2], -1)  # [K, B, tokens]
        seen = jnp.arange(keys.shape[2])[None, :] < tokens[:, None]
        largest = jnp.max(jnp.where(seen[None], keys, 0.0), axis=2).T
        return largest * part.codecs[0].query_gain(own)[None]

    found = rows.join([of_member(member) for member in rows.members], axis=1)
    if cache.key_mean is None:
        return found
    mean = reach(cache.key_mean[rows.layer])
    if cache.phases is None:
        found = jnp.maximum(found, mean)
    else:  # a part of the keys; each channel of the rotated one at most sqrt(H) times as large
        found = found + mean * cache.config.head_dim
    return jnp.where((tokens > 0)[:, None], found, 0.0)


def bad_values_of_blocks(cache: Cache, rows: LayerRows) -> Bool[Array, "B K H"]:
    """Where a value in full precision that is seen is not finite."""
    (member,) = rows.members
    values = cache.parts[member.part].pool.values[0][0]
    table = jnp.maximum(cache.table.page_table, 0)
    bad = ~jnp.isfinite(values[member.of(cache.kv_heads)[:, None, None], table[None]])
    bad = bad.reshape(*bad.shape[:2], -1, bad.shape[-1])  # [K, B, tokens, H]
    tokens = cache.layout.compressed_tokens(cache.lengths)
    seen = jnp.arange(bad.shape[2])[None, :] < tokens[:, None]
    return jnp.swapaxes(jnp.any(bad & seen[None, :, :, None], axis=2), 0, 1)
