"""Speculative decoding: several tokens a pass over the weights, and the answer that it would be.

A pass reads each row's newest token and a draft of those that follow, as one chunk of proposed
tokens; the first of them that the model agrees with stay, and one token of its own comes for free.
The others are taken back without a trace.

Greedy answers, and those to drafts that are no draws, are token for token those of `decode`, with
the same keys: each token is drawn as there, and a draft stays where it is what was drawn. That is
the rejection rule for a draft without a choice. Tokens that a model drew from q stay with
probability min(1, p / q), and the first that does not is drawn anew from max(0, p - q): so every
token has the distribution p of `decode` (Leviathan, Kalman and Matias, arXiv:2211.17192), though
the same keys give another answer.

A chunk ends where a block of the past is complete (`Past.room`): what is behind would see it
compressed. Rounding may differ between one pass and several, so that equal answers are certain in
exact arithmetic, likely in float32, and in bfloat16 up to the first near tie.
"""

import dataclasses
import functools
from typing import Any, Generic, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from turboquant_jax.models.drafts import Draft, Drafter, Turn, put
from turboquant_jax.models.generate import NO_TOKEN, Generation, Past, draw, is_in
from turboquant_jax.models.model import Llama, State
from turboquant_jax.models.options import GREEDY, Sampling
from turboquant_jax.models.sampling import probabilities

_JUDGING = (1 << 30) + 1  # no position: keys of decisions are others than those of answers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Speculation(Generic[State]):
    """What was generated, and what it took.

    Attributes:
      generation: as of `decode`.
      passes: of each row, how many times the weights were read for it.
      drafted, accepted: of each row, tokens that were guessed, and those of them in the answer.
      own: the drafter's state, which has read the answer too.
    """

    generation: Generation[State]
    passes: Int[Array, "B"]
    drafted: Int[Array, "B"]
    accepted: Int[Array, "B"]
    own: Any


class _Carry(NamedTuple):
    """Of the loop; `position` is that of each row's newest token."""

    token: Int[Array, "B"]
    position: Int[Array, "B"]
    active: Bool[Array, "B"]
    tokens: Int[Array, "B max_tokens"]
    counts: Int[Array, "B"]
    work: Int[Array, "3 B"]  # passes, drafted, accepted
    state: Any
    own: Any  # the drafter's


@functools.partial(
    jax.jit,
    static_argnames=("past", "drafter", "max_tokens", "sampling"),
    donate_argnames=("state", "own"),
)
def decode(
    model: Llama,
    logits: Float[Array, "B V"],
    positions: Int[Array, "B"],
    keys: Key[Array, "B"],
    state: State,
    past: Past[State],
    drafter: Drafter,
    own: Any,
    *,
    draft_model: Llama | None = None,
    max_tokens: int,
    sampling: Sampling = GREEDY,
) -> Speculation[State]:
    """`generate.decode` with drafts, in one `lax.while_loop`.

    `own` is the drafter's state, which has read the prompts; it and the state are donated. No row
    needs more room than in `generate.decode`.

    Raises:
      ValueError: no tokens to generate, or a past that takes none back.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens: got {max_tokens}, expected at least 1")
    if past.propose is None:
        raise ValueError("past: got one that takes no tokens back, expected `propose` and `room`")
    first = draw(logits, keys, positions, sampling)
    one = jnp.ones_like(first)
    own = drafter.keep(own, first[:, None], positions - 1, one)
    tokens = jnp.full((first.shape[0], max_tokens), NO_TOKEN, jnp.int32).at[:, 0].set(first)
    active = ~is_in(first, sampling.eos_ids) & (max_tokens > 1)
    work = jnp.zeros((3, first.shape[0]), jnp.int32)
    carry = _Carry(first, positions, active, tokens, one, work, state, own)
    turn = functools.partial(_turn, model, draft_model, keys, past, drafter, sampling)
    done = lax.while_loop(lambda carry: jnp.any(carry.active), turn, carry)
    made = Generation(done.tokens, done.counts, done.state)
    passes, drafted, accepted = done.work
    return Speculation(made, passes, drafted, accepted, done.own)


def _turn(
    model: Llama,
    draft_model: Llama | None,
    keys: Key[Array, "B"],
    past: Past,
    drafter: Drafter,
    sampling: Sampling,
    carry: _Carry,
) -> _Carry:
    """A draft, a pass over it, and what stays."""
    assert past.propose is not None and past.room is not None
    max_tokens, width = carry.tokens.shape[1], drafter.tokens + 1
    most = jnp.minimum(max_tokens - carry.counts, past.room(carry.state))
    most = jnp.where(carry.active, jnp.clip(most, 1, width), 0)
    turn = Turn(carry.token, carry.position, most, keys)
    draft, own = drafter.draft(draft_model, carry.own, turn, sampling)
    read = jnp.concatenate([carry.token[:, None], draft.tokens], axis=1)
    position = carry.position[:, None] + jnp.arange(width, dtype=jnp.int32)[None, :]
    state = past.propose(carry.state, jnp.where(carry.active, draft.counts + 1, 0), width)
    hidden, state = model(read, position, state, past.attend)
    made, accepted = judge(model.logits(hidden), draft, keys, carry.position, sampling)
    count, ended = _end(made, accepted + 1, sampling)
    count = jnp.where(carry.active, count, 0)
    own = drafter.keep(own, made, carry.position, count)
    last = jnp.take_along_axis(made, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
    work = [carry.active.astype(jnp.int32), draft.counts, jnp.minimum(accepted, count)]
    return _Carry(
        token=jnp.where(carry.active, last, carry.token),
        position=carry.position + count,
        active=carry.active & ~ended & (carry.counts + count < max_tokens),
        tokens=put(carry.tokens, made, carry.counts, count),
        counts=carry.counts + count,
        work=carry.work + jnp.where(carry.active, jnp.stack(work), 0),
        state=past.commit(state, count),  # the newest token's key and value come with the next pass
        own=own,
    )


def judge(
    logits: Float[Array, "B T V"],
    draft: Draft,
    keys: Key[Array, "B"],
    position: Int[Array, "B"],
    sampling: Sampling,
) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    """How many tokens of a draft stay, and those with the one that follows them.

    `logits` are those after each row's newest token, at `position`, and after each of the draft.
    """
    batch, width, vocab = logits.shape
    step = jnp.arange(width, dtype=jnp.int32)[None, :]
    after = position[:, None] + 1 + step
    drafted = step[:, :-1] < draft.counts[:, None]
    if draft.logits is None:
        flat = logits.reshape(-1, vocab), jnp.repeat(keys, width), after.ravel()
        drawn = draw(*flat, sampling).reshape(batch, width)
        return drawn, _prefix(drafted & (drawn[:, :-1] == draft.tokens))
    p, q = (
        probabilities(x.reshape(-1, vocab), sampling).reshape(x.shape)
        for x in (logits, draft.logits)
    )
    q = jnp.where(drafted[..., None], q, 0.0)
    of_p, of_q = (
        jnp.take_along_axis(x, draft.tokens[..., None], axis=2)[..., 0] for x in (p[:, :-1], q)
    )
    chance = jax.vmap(jax.vmap(_uniform, in_axes=(None, 0)))(keys, after[:, :-1])
    accepted = _prefix(drafted & (chance * of_q < of_p))
    # behind the last token that stays: p where nothing was drafted, else what q lacks of it
    here = accepted[:, None, None]
    behind = jnp.concatenate([q, jnp.zeros_like(p[:, :1])], axis=1)
    p, q = (jnp.take_along_axis(x, here, axis=1)[:, 0] for x in (p, behind))
    rest = jnp.maximum(p - q, 0.0)
    rest = jnp.where(jnp.any(rest > 0, axis=1, keepdims=True), rest, p)  # but for rounding
    own = jax.vmap(jax.random.fold_in)(keys, position + 1 + accepted)
    drawn = jax.vmap(jax.random.categorical)(own, jnp.log(rest)).astype(jnp.int32)
    kept = jnp.pad(draft.tokens, ((0, 0), (0, 1)))
    return jnp.where(step < accepted[:, None], kept, drawn[:, None]), accepted


def _uniform(key: Key[Array, ""], position: Int[Array, ""]) -> Float[Array, ""]:
    return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, _JUDGING), position))


def _prefix(right: Bool[Array, "B k"]) -> Int[Array, "B"]:
    """How many are right before the first that is not."""
    return jnp.sum(jnp.cumprod(right.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)


def _end(
    made: Int[Array, "B T"], count: Int[Array, "B"], sampling: Sampling
) -> tuple[Int[Array, "B"], Bool[Array, "B"]]:
    """How many of the first `count` tokens there are up to a stop token; whether there is one."""
    step = jnp.arange(made.shape[1], dtype=jnp.int32)[None, :]
    stops = is_in(made, sampling.eos_ids) & (step < count[:, None])
    ended = jnp.any(stops, axis=1)
    return jnp.where(ended, jnp.argmax(stops, axis=1).astype(jnp.int32) + 1, count), ended
