"""Generation from the host: whole answers, or tokens as they are made.

What the compiled functions of `generate` keep as data is raised here: a row that its past has no
room for stops the call, after the tokens that are right.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from turboquant_jax.models.generate import (
    CHUNK,
    NO_TOKEN,
    Generation,
    Past,
    decode,
    draw,
    is_in,
    pad_prompts,
    prefill,
    step,
)
from turboquant_jax.models.model import Llama, State
from turboquant_jax.models.options import GREEDY, Sampling


def generate(
    model: Llama,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    keys: Key[Array, "B"],
    state: State,
    past: Past[State],
    *,
    max_tokens: int,
    sampling: Sampling = GREEDY,
) -> Generation[State]:
    """`prefill`, then `decode`: the continuation of each prompt, from an empty state, donated.

    Raises:
      ValueError: a prompt or an answer that its row has no room for.
    """
    logits, state = prefill(model, tokens, lengths, state, past)
    refuse_overflow(state)
    options: dict[str, Any] = dict(max_tokens=max_tokens, sampling=sampling)
    made = decode(model, logits, lengths, keys, state, past, **options)
    refuse_overflow(made.state)
    return made


def read(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    state: State,
    past: Past[State],
    *,
    start: int = 0,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "B V"], Int[Array, "B"], State]:
    """`prefill` of token ids, behind the `start` tokens that each row of the state has.

    Returns the logits after each row, the tokens that each row has then, and the state. Rows are
    padded to a power of two, or to whole chunks, so that few programs are compiled.

    Raises:
      ValueError: a prompt without tokens, or one that its row has no room for.
    """
    tokens, lengths = pad_prompts(prompts)
    length = tokens.shape[1]
    width = min(chunk, 1 << max(5, (length - 1).bit_length()))
    width = max(width, -(-length // width) * width)
    padded = jnp.pad(jnp.asarray(tokens), ((0, 0), (0, width - length)))
    begin = jnp.full(lengths.shape, start, jnp.int32)
    logits, state = prefill(
        model, padded, jnp.asarray(lengths), state, past, start=begin, chunk=chunk
    )
    refuse_overflow(state)
    return logits, begin + lengths, state


def steps(
    model: Llama,
    logits: Float[Array, "B V"],
    positions: Int[Array, "B"],
    keys: Key[Array, "B"],
    state: State,
    past: Past[State],
    *,
    max_tokens: int,
    sampling: Sampling = GREEDY,
) -> Iterator[tuple[np.ndarray, State]]:
    """The tokens of `decode`, int32 [B] a step, as they are made: one compiled step, a host loop.

    Beside them comes the state, which holds all tokens but the newest of each row; the next step
    takes it away. A row that has stopped yields `NO_TOKEN`. The state is donated.

    Raises:
      ValueError: at the step that a row has no room for, after the tokens before it.
    """
    refuse_overflow(state)
    token = draw(logits, keys, positions, sampling)
    active = jnp.ones(token.shape, jnp.bool_)
    for count in range(max_tokens):
        yield np.where(active, token, NO_TOKEN), state
        active = active & ~is_in(token, sampling.eos_ids)
        if count + 1 == max_tokens or not active.any():
            return
        token, state = step(model, token, positions + count, active, keys, state, past, sampling)
        refuse_overflow(state)


def stream(*arguments: Any, **options: Any) -> Iterator[np.ndarray]:
    """The tokens of `steps`, which takes the same arguments."""
    return (tokens for tokens, _ in steps(*arguments, **options))


def refuse_overflow(state: Any) -> None:
    """ValueError with the rows that a past had no room for, and the room.

    Looks at `overflow`, bool [B], and `capacity`, tokens of a row, where the state has them; a
    state that is being traced has no values to look at.
    """
    overflow = getattr(state, "overflow", None)
    if overflow is None or isinstance(overflow, jax.core.Tracer):
        return
    rows = np.flatnonzero(np.asarray(overflow)).tolist()
    if rows:
        capacity = getattr(state, "capacity", None)
        room = "its capacity" if capacity is None else f"its capacity of {capacity}"
        which = f"row {rows[0]}" if len(rows) == 1 else f"rows {', '.join(map(str, rows))}"
        raise ValueError(
            f"{which}: got more tokens than there is room for, expected at most {room}"
        )
