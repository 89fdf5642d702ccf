"""What compression does to a model on a text: perplexity, KL divergence, agreement.

Teacher forcing with the semantics of decoding: every query sees exactly what it would see token by
token through the real cache, but the text passes the decoder once (`teacher_forcing`).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from turboquant_jax.attention.definition import check_window
from turboquant_jax.attention.segments import attend_segment
from turboquant_jax.attention.teacher_forcing import teacher_forced
from turboquant_jax.cache import Cache
from turboquant_jax.models.model import Llama
from turboquant_jax.models.token_ids import require_token_ids


@dataclass(frozen=True)
class Comparison:
    """One number per predicted token, float32 [tokens] each.

    Attributes:
      nll: negative log-likelihood of the text's token, in nats.
      kl: KL divergence of the prediction from that in full precision, in nats.
      agrees: whether the most likely token is the same, 0 or 1.
    """

    nll: np.ndarray
    kl: np.ndarray
    agrees: np.ndarray

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        return float(np.exp(self.nll.mean(dtype=np.float64)))


def exact_hidden(model: Llama, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Final hidden vectors with attention in full precision."""
    require_token_ids(tokens, model.config.vocab_size)
    return _exact_hidden(model, tokens)


@jax.jit
def _exact_hidden(model, tokens):
    position = jnp.arange(tokens.shape[1])
    distance, window = position[:, None] - position[None, :], model.config.sliding_window
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    visible = jnp.broadcast_to(seen[None, :, :], (tokens.shape[0], *seen.shape))

    def attend(state, _, projection):
        q, k, v = projection.heads()
        return attend_segment(q, k, v, visible, projection.scores)[0], state

    return model(tokens, _positions(tokens), (), attend)[0]


def compressed_hidden(
    model: Llama, tokens: Int[Array, "B T"], cache: Cache
) -> Float[Array, "B T D"]:
    """Final hidden vectors with a compressed cache, as if decoded token by token.

    Of the cache only config and codecs are used: make it for one token.
    """
    require_token_ids(tokens, model.config.vocab_size)
    return _compressed_hidden(model, tokens, cache)


@jax.jit
def _compressed_hidden(model, tokens, cache):
    def attend(cache, layer, projection):
        check_window(cache, projection)
        heads = projection.heads()
        return teacher_forced(cache, layer, *heads, scores=projection.scores), cache

    return model(tokens, _positions(tokens), cache, attend)[0]


def compare(
    model: Llama,
    tokens: Int[Array, "B T"],
    exact: Float[Array, "B T D"],
    other: Float[Array, "B T D"],
) -> Comparison:
    """Compare the predictions of tokens[:, 1:] from two sets of final hidden vectors."""
    nll, kl, agrees = _compare(model, tokens, exact, other)
    return Comparison(*(np.asarray(x).ravel() for x in (nll, kl, agrees)))


@jax.jit
def _compare(model, tokens, exact, other):
    """Position by position: logits of a whole text would be gigabytes."""

    def at(xs):
        target, *hidden = xs  # [B], [B, D]
        p, q = (jax.nn.log_softmax(model.logits(h[:, None])[:, 0]) for h in hidden)
        nll = -jnp.take_along_axis(q, target[:, None], axis=1)[:, 0]
        kl = jnp.sum(jnp.exp(p) * (p - q), axis=1)
        return nll, kl, (jnp.argmax(p, axis=1) == jnp.argmax(q, axis=1)).astype(jnp.float32)

    by_position = (jnp.moveaxis(x, 1, 0) for x in (tokens[:, 1:], exact[:, :-1], other[:, :-1]))
    return lax.map(at, tuple(by_position), batch_size=256)


def _positions(tokens):
    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)
