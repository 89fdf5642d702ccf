"""The choice of the next token: greedy, or random after temperature, top-k and top-p."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to draw from logits; static under `jax.jit`. A temperature of 0 is greedy.

    The filters act in the order of the fields: logits are divided by `temperature`, the `top_k`
    largest are kept (of equal ones the lower ids), and of these the smallest set of most probable
    tokens whose probability reaches `top_p`. Raises ValueError for values without a meaning.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: got {self.temperature}, expected a number >= 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: got {self.top_k}, expected an integer >= 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p}, expected a number in (0, 1]")


GREEDY = Sampling()
"""The most probable token, always."""


def sample(
    logits: Float[Array, "B V"], keys: Key[Array, "B"], sampling: Sampling
) -> Int[Array, "B"]:
    """One token per row, int32, drawn with the row's own key: rows do not depend on the batch."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is None and sampling.top_p is None:
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    vocab = logits.shape[-1]
    values, ids = lax.top_k(logits, min(sampling.top_k or vocab, vocab))
    if sampling.top_p is not None:
        probabilities = jax.nn.softmax(values, axis=-1)
        more_probable = jnp.cumsum(probabilities, axis=-1) - probabilities
        values = jnp.where(more_probable < sampling.top_p, values, -jnp.inf)
    choice = jax.vmap(jax.random.categorical)(keys, values)
    return jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)
