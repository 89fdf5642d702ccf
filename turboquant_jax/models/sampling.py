"""The choice of the next token: greedy, or random after temperature, top-k and top-p."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key

from turboquant_jax.models.options import GREEDY as GREEDY
from turboquant_jax.models.options import Sampling

_SMALLEST = float(np.finfo(np.float32).tiny)


def sample(
    logits: Float[Array, "B V"], keys: Key[Array, "B"], sampling: Sampling
) -> Int[Array, "B"]:
    """One token per row, int32, drawn with the row's own key: rows do not depend on the batch."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    values, ids = _filtered(logits, sampling)
    choice = jax.vmap(jax.random.categorical)(keys, values)
    if ids is None:
        return choice.astype(jnp.int32)
    return jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)


def probabilities(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Those with which `sample` draws each token, float32; not of greedy draws."""
    values, ids = _filtered(logits, sampling)
    found = jax.nn.softmax(values, axis=-1)
    if ids is None:
        return found
    row = jnp.broadcast_to(jnp.arange(ids.shape[0])[:, None], ids.shape)
    return jnp.zeros(logits.shape, jnp.float32).at[row, ids].set(found)


def _filtered(
    logits: Float[Array, "B V"], sampling: Sampling
) -> tuple[Float[Array, "B k"], Int[Array, "B k"] | None]:
    """Logits after temperature and filters, and the tokens that they are of, unless all."""
    logits = logits.astype(jnp.float32)
    # the largest becomes 0 first: divided by a small temperature it would be infinite
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    # a smaller divisor flushes to 0; at this one all that is not the largest is -inf already
    logits = logits / max(sampling.temperature, _SMALLEST)
    if sampling.top_k is None and sampling.top_p is None:
        return logits, None
    vocab = logits.shape[-1]
    values, ids = lax.top_k(logits, min(sampling.top_k or vocab, vocab))
    if sampling.top_p is not None:
        probabilities = jax.nn.softmax(values, axis=-1)
        more_probable = jnp.cumsum(probabilities, axis=-1) - probabilities
        values = jnp.where(more_probable < sampling.top_p, values, -jnp.inf)
    return values, ids
