"""A decoder whose next token is known, and drafts of it that are right as often as is asked for."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from turboquant_jax.models import Llama, LlamaConfig
from turboquant_jax.models.drafts import Draft, Drafter, Turn
from turboquant_jax.models.model import random_model
from turboquant_jax.models.options import Sampling

# Of an embedding's channels: far more than random layers, whose outputs are of order one, add.
_LARGE = 64.0

State = tuple[Float[Array, ""], Key[Array, ""]]
"""Of the drafter: the probability that a token is right, and a key."""


def predictable(config: LlamaConfig) -> Llama:
    """Random weights, but for a vocabulary matrix that answers token t with t + `step_of(model)`.

    A layer costs what it costs; a vector of the residual stream stays close to its embedding.
    """
    model = random_model(config, 0, stacked=False)
    grow = jax.jit(lambda x: x * jnp.asarray(_LARGE * x.shape[1] ** 0.5, x.dtype), donate_argnums=0)
    embedding = grow(model.embedding[...])
    if model.head is not None:
        model.head = None  # its memory first
        model.head = nnx.Param(jax.jit(lambda x: jnp.roll(x, 1, axis=0))(embedding))
    model.embedding = nnx.Param(embedding)
    return jax.block_until_ready(model)


def step_of(model: Llama) -> int:
    """What the next token is more than the last one, modulo the vocabulary."""
    return 0 if model.head is None else 1


@functools.cache
def drafter(tokens: int, step: int, vocab: int) -> Drafter:
    """Each token of a draft is right with the probability of the state, whatever the others are."""

    def draft(_, state: State, turn: Turn, sampling: Sampling) -> tuple[Draft, Any]:
        probability, key = state
        place = jnp.arange(1, tokens + 1, dtype=jnp.int32)[None, :]
        right = (turn.token[:, None] + step * place) % vocab
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, turn.position)
        chance = jax.vmap(lambda key: jax.random.uniform(key, (tokens,)))(keys)
        found = jnp.where(chance < probability, right, (right + 1) % vocab)
        return Draft(found, jnp.clip(turn.most - 1, 0, tokens), None), state

    return Drafter(tokens, draft, lambda state, *_: state)
