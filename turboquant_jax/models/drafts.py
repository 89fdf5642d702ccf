"""Where drafts come from: an earlier place in the text, or a second, smaller decoder.

A draft is a guess of the next tokens. It costs time where it is wrong and changes no answer: what
stays, `speculate` decides.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from pallas_kernels.primitives.limits import MAX_QUERIES
from turboquant_jax.models.generate import Past, draw, forward
from turboquant_jax.models.options import Sampling

LONGEST = 32
"""Most tokens of the text's end that are looked for before it."""

MOST = MAX_QUERIES - 1
"""Tokens of a draft, at most: the one before them is a query too."""

_DRAFTING = 1 << 30  # no position: keys of drafts are others than those of answers


class Turn(NamedTuple):
    """What a draft is asked for: each row's newest token, its position, and the row's key.

    Of `most` tokens in one pass, at least one, the newest token is the first; 0 where a row has
    stopped.
    """

    token: Int[Array, "B"]
    position: Int[Array, "B"]
    most: Int[Array, "B"]
    keys: Key[Array, "B"]


class Draft(NamedTuple):
    """The first `counts` of `tokens` follow each row's newest one, fewer than `Turn.most`.

    `logits` are those that they were drawn with; None where they are no draws.
    """

    tokens: Int[Array, "B k"]
    counts: Int[Array, "B"]
    logits: Float[Array, "B k V"] | None


@dataclass(frozen=True)
class Drafter:
    """How drafts are made of a state of its own; static under `jax.jit`: make it once.

    Attributes:
      tokens: k, most tokens of a draft.
      draft: of (model, state, turn, sampling); the model is what the drafter reads, or None.
      keep: of (state, tokens [B, T], position [B], counts [B]): behind a row's newest token, at
        its position, the first `counts` tokens follow.
    """

    tokens: int
    draft: Callable[[Any, Any, Turn, Sampling], tuple[Draft, Any]]
    keep: Callable[..., Any]

    def __post_init__(self):
        if not 1 <= self.tokens <= MOST:
            raise ValueError(f"tokens of a draft: got {self.tokens}, expected 1 to {MOST}")


@functools.cache
def look_up(tokens: int) -> Drafter:
    """Drafts by prompt look-up; the state is the text, ids [B, S], with room for the answer.

    Raises:
      ValueError: a number of tokens that no draft has.
    """

    def draft(_, text: Int[Array, "B S"], turn: Turn, sampling: Sampling):
        begin = continuation(text, turn.position)
        again = turn.position + 1 - begin  # where the text ends, its end goes on as a period
        step = jnp.arange(tokens, dtype=jnp.int32)[None, :]
        index = begin[:, None] + step % jnp.maximum(again, 1)[:, None]
        found = jnp.take_along_axis(text, jnp.clip(index, 0, text.shape[1] - 1), axis=1)
        most = jnp.clip(turn.most - 1, 0, tokens)
        return Draft(found, jnp.where(begin < 0, 0, most), None), text

    def keep(text, made, position, counts):
        return put(text, made, position + 1, counts)

    return Drafter(tokens, draft, keep)


def continuation(text: Int[Array, "B S"], last: Int[Array, "B"]) -> Int[Array, "B"]:
    """Where the longest n-gram that ends the text, at `last`, went on before; -1 if nowhere.

    Up to `LONGEST` tokens of it count; of several places the newest.
    """
    place = jnp.arange(text.shape[1], dtype=jnp.int32)[None, :]  # behind an occurrence

    def matches(n):
        """Places before which the n-th token from the end stands where it should."""
        ours = jnp.take_along_axis(text, jnp.maximum(last[:, None] - n, 0), axis=1)
        theirs = jnp.roll(text, n + 1, axis=1)
        return (theirs == ours) & (place > n) & (place <= last[:, None])

    def longer(carry):
        n, found, alive = carry
        more = found & alive & matches(n)
        alive = jnp.any(more, axis=1, keepdims=True)
        return n + 1, jnp.where(alive, more, found), alive

    def going_on(carry):
        n, _, alive = carry
        return jnp.any(alive) & (n < LONGEST)

    first = matches(jnp.int32(0))
    carry = jnp.int32(1), first, jnp.any(first, axis=1, keepdims=True)
    _, found, _ = lax.while_loop(going_on, longer, carry)
    return jnp.max(jnp.where(found, place, -1), axis=1)


@functools.cache
def by_model(tokens: int, past: Past) -> Drafter:
    """Drafts by a decoder; the state is its own past, which has read what the other one has.

    It reads token by token as many as it may, and its past is set back to those that stay. One
    token less than completes a block of it can be taken back.

    Raises:
      ValueError: a number of tokens that no draft has, or a past that takes none back.
    """
    room = past.room
    if room is None:
        raise ValueError("past of the draft's model: got one that takes no tokens back")

    def draft(model, state, turn: Turn, sampling: Sampling):
        most = jnp.minimum(turn.most, jnp.maximum(room(state) - 1, 1))
        keys = jax.vmap(lambda key: jax.random.fold_in(key, _DRAFTING))(turn.keys)

        def step(carry, i):
            token, state = carry
            position = turn.position + i
            counts = (i < most).astype(jnp.int32)
            hidden, state = forward(model, token[:, None], position[:, None], counts, state, past)
            logits = model.logits(hidden)[:, 0]
            token = draw(logits, keys, position + 1, sampling)
            return (token, state), (token, None if sampling.temperature == 0 else logits)

        # the last of them is read for its key and value alone
        (_, state), (found, logits) = lax.scan(
            step, (turn.token, state), jnp.arange(tokens + 1, dtype=jnp.int32)
        )
        logits = None if logits is None else jnp.moveaxis(logits[:-1], 0, 1)
        return Draft(found[:-1].T, jnp.maximum(most - 1, 0), logits), state

    return Drafter(
        tokens, draft, lambda state, _, position, counts: state.with_lengths(position + counts)
    )


def put(
    tokens: Int[Array, "B S"],
    made: Int[Array, "B T"],
    start: Int[Array, "B"],
    count: Int[Array, "B"],
) -> Int[Array, "B S"]:
    """The first `count` tokens made of each row, put from `start` on; none past the end."""
    step = jnp.arange(made.shape[1], dtype=jnp.int32)[None, :]
    place = jnp.where(step < count[:, None], start[:, None] + step, tokens.shape[1])
    row = jnp.broadcast_to(jnp.arange(tokens.shape[0])[:, None], place.shape)
    return tokens.at[row, place].set(made, mode="drop")
