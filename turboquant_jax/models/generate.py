"""Generation, compiled: prompts into the past, then tokens out of one loop.

These functions keep an overflow as data, in the state; those of `decoding` raise it.
The past is any pytree; how it is read and written stands in a `Past`. Rows of a batch are ragged:
every forward pass says how many of its tokens count in each row, so that neither padding nor the
steps of a finished row leave anything in the past.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from turboquant_jax.models.model import Attend, Llama, State
from turboquant_jax.models.options import GREEDY, Sampling
from turboquant_jax.models.sampling import sample
from turboquant_jax.models.token_ids import require_token_ids

CHUNK = 8192
"""Tokens of a pass over a prompt: so many queries pay for decoding the past that they share."""

NO_TOKEN = -1
"""What stands where a row has no token: it had stopped before."""


@dataclasses.dataclass(frozen=True)
class Past(Generic[State]):
    """How the state of earlier tokens is read and written; static under `jax.jit`.

    A forward pass of T tokens a row goes `begin(state, counts, T)`, then `attend` once a layer,
    which also stores the new keys and values, then `commit(state)`. The first `counts[b]` tokens
    of row b are real, the rest is padding whose outputs are ignored; none are where a row has
    stopped. Compilation is cached by the identity of the functions: make them once, not per call.

    Of a past that can take tokens back, `propose` is `begin` of tokens of which `commit(state,
    accepted)` keeps the first ones of each row, and `room(state)` says how many of them, at least
    one, see what they would see one by one. So many single tokens less one `with_lengths` undoes.
    `first` is the `attend` of a past that holds nothing: a prompt's own attention, and no more.
    """

    begin: Callable[[State, Int[Array, "B"], int], State]
    attend: Attend[State]
    commit: Callable[..., State]
    propose: Callable[[State, Int[Array, "B"], int], State] | None = None
    room: Callable[[State], Int[Array, "B"]] | None = None
    first: Attend[State] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generation(Generic[State]):
    """Row b generated `tokens[b, :counts[b]]`, a stop token included; `NO_TOKEN` follows.

    The state holds every token but the last of each row, which no forward pass has seen.
    """

    tokens: Int[Array, "B max_tokens"]
    counts: Int[Array, "B"]
    state: State


def pad_prompts(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [B, T] padded with zeros on the right, and lengths [B], both int32."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if lengths.size == 0 or lengths.min() == 0:
        raise ValueError(f"got prompts of {lengths.tolist()} tokens, expected at least one each")
    tokens = np.zeros((lengths.size, lengths.max()), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


def prefill(
    model: Llama,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    state: State,
    past: Past[State],
    *,
    start: Int[Array, "B"] | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "B V"], State]:
    """Pass prompts through the decoder; float32 logits after the last token of each row.

    Row b is `tokens[b, :lengths[b]]`, at least one token, at positions from `start[b]` (default 0)
    on. A forward pass takes `chunk` tokens at a time, which bounds the memory; the past that
    a chunk attends to is compressed already.
    The state is donated: use the one returned. One chunk into a state that is seen to be empty
    is a smaller program.

    Raises:
      ValueError: an id that the embedding has no row for, where the values are at hand: not under
        `jax.jit`.
    """
    require_token_ids(tokens, model.config.vocab_size, lengths)
    # of several chunks the later ones find a past: the same program, whatever the first one finds
    empty = past.first is not None and tokens.shape[1] <= chunk and _is_empty(state)
    return compiled_prefill(
        model, tokens, lengths, state, past, start=start, chunk=chunk, empty=empty
    )


def _is_empty(state: Any) -> bool:
    """Whether every row holds no token, where that can be looked at: not under `jax.jit`."""
    return not isinstance(state.lengths, jax.core.Tracer) and not np.any(state.lengths)


@functools.partial(jax.jit, static_argnames=("past", "chunk", "empty"), donate_argnames="state")
def compiled_prefill(
    model: Llama,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    state: State,
    past: Past[State],
    *,
    start: Int[Array, "B"] | None = None,
    chunk: int = CHUNK,
    empty: bool = False,
) -> tuple[Float[Array, "B V"], State]:
    """`prefill` of tokens that were looked at, into a state that was, where it is `empty`."""
    batch, length = tokens.shape
    chunk = min(length, chunk)
    if chunk < 1:
        raise ValueError(f"chunk: got {chunk} tokens, expected at least 1")
    start = jnp.zeros_like(lengths) if start is None else start
    chunks = -(-length // chunk)
    if empty and chunks == 1 and past.first is not None:
        past = dataclasses.replace(past, attend=past.first)
    padded = jnp.pad(tokens, ((0, 0), (0, chunks * chunk - length)))

    def step(carry, chunk_and_offset):
        last, state = carry
        tokens, offset = chunk_and_offset
        counts = jnp.clip(lengths - offset, 0, chunk)
        positions = (start + offset)[:, None] + jnp.arange(chunk, dtype=jnp.int32)[None, :]
        hidden, state = forward(model, tokens, positions, counts, state, past)
        final = lengths - 1 - offset
        row = jnp.take_along_axis(hidden, jnp.clip(final, 0, chunk - 1)[:, None, None], axis=1)
        ends_here = (final >= 0) & (final < chunk)
        last = jnp.where(ends_here[:, None, None], row, last)
        return (last, state), None

    by_chunk = padded.reshape(batch, chunks, chunk).swapaxes(0, 1)
    offsets = chunk * jnp.arange(chunks, dtype=jnp.int32)
    none = jnp.zeros((batch, 1, model.config.hidden_size), model.embedding[...].dtype)
    (last, state), _ = lax.scan(step, (none, state), (by_chunk, offsets))
    return model.logits(last)[:, 0], state


@functools.partial(
    jax.jit, static_argnames=("past", "max_tokens", "sampling"), donate_argnames="state"
)
def decode(
    model: Llama,
    logits: Float[Array, "B V"],
    positions: Int[Array, "B"],
    keys: Key[Array, "B"],
    state: State,
    past: Past[State],
    *,
    max_tokens: int,
    sampling: Sampling = GREEDY,
) -> Generation[State]:
    """Generate up to `max_tokens` tokens per row in one `lax.while_loop`.

    `logits` come from `prefill`, and `positions` says how many tokens each row has already. A row
    stops after one of `sampling.eos_ids`, the loop when every row has. The token at position p is
    drawn with the row's key folded with p: a row's tokens depend neither on the batch nor on how
    its generation is cut into calls. The state is donated.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens: got {max_tokens}, expected at least 1")
    first = draw(logits, keys, positions, sampling)
    tokens = jnp.full((first.shape[0], max_tokens), NO_TOKEN, jnp.int32).at[:, 0].set(first)

    def going_on(carry):
        step, _, active, *_ = carry
        return (step < max_tokens) & jnp.any(active)

    def body(carry):
        step, token, active, tokens, counts, state = carry
        drawn, state = _step(
            model, token, positions + (step - 1), active, keys, state, past, sampling
        )
        tokens = tokens.at[:, step].set(jnp.where(active, drawn, NO_TOKEN))
        counts = counts + active.astype(jnp.int32)
        token = jnp.where(active, drawn, token)
        return step + 1, token, active & ~is_in(drawn, sampling.eos_ids), tokens, counts, state

    counts = jnp.ones_like(first)
    carry = (jnp.int32(1), first, ~is_in(first, sampling.eos_ids), tokens, counts, state)
    *_, tokens, counts, state = lax.while_loop(going_on, body, carry)
    return Generation(tokens, counts, state)


def forward(
    model: Llama,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    counts: Int[Array, "B"],
    state: State,
    past: Past[State],
) -> tuple[Float[Array, "B T D"], State]:
    """One pass through all layers, of which the first `counts` tokens of each row are kept."""
    state = past.begin(state, counts, tokens.shape[1])
    hidden, state = model(tokens, positions, state, past.attend)
    return hidden, past.commit(state)


def _step(
    model: Llama,
    token: Int[Array, "B"],
    position: Int[Array, "B"],
    active: Bool[Array, "B"],
    keys: Key[Array, "B"],
    state: State,
    past: Past[State],
    sampling: Sampling,
) -> tuple[Int[Array, "B"], State]:
    """Feed each row its token at its position; draw the next."""
    counts = active.astype(jnp.int32)
    hidden, state = forward(model, token[:, None], position[:, None], counts, state, past)
    return draw(model.logits(hidden)[:, 0], keys, position + 1, sampling), state


step = jax.jit(_step, static_argnames=("past", "sampling"), donate_argnames="state")
"""`_step`, compiled; the state is donated."""


@functools.partial(jax.jit, static_argnames="sampling")
def draw(
    logits: Float[Array, "B V"],
    keys: Key[Array, "B"],
    positions: Int[Array, "B"],
    sampling: Sampling,
) -> Int[Array, "B"]:
    """The tokens for these positions, each with the row's key folded with its position."""
    return sample(logits, jax.vmap(jax.random.fold_in)(keys, positions), sampling)


def is_in(token: Int[Array, "*batch"], ids: tuple[int, ...]) -> Bool[Array, "*batch"]:
    """Whether each token is one of `ids`."""
    return jnp.isin(token, jnp.array(ids, jnp.int32))
