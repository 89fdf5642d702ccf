"""`generate --speculate`: an answer in fewer passes over the weights, and how many they were."""

import argparse
import copy
import sys
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from turboquant_jax.cache import Cache
from turboquant_jax.cache.choose import choose_attention
from turboquant_jax.cli import choices, settings
from turboquant_jax.models import Checkpoint, load, speculate
from turboquant_jax.models.decoding import read, refuse_overflow
from turboquant_jax.models.drafts import Drafter, by_model, look_up
from turboquant_jax.models.generate import Generation, pad_prompts
from turboquant_jax.models.model import Llama
from turboquant_jax.models.options import Sampling


@dataclass(frozen=True)
class Drafts:
    """A drafter that has read the prompts.

    Attributes:
      name: of the second model, or of the way without one.
      attention: what attends to the tokens of a pass, or None of a dense past.
    """

    name: str
    drafter: Drafter
    own: Any
    model: Llama | None
    attention: str | None


def prepare(
    arguments: argparse.Namespace,
    checkpoint: Checkpoint,
    prompts: list[list[int]],
    state: Any,
) -> Drafts:
    """Make what the flags ask for, and let it read the prompts.

    Raises:
      ValueError: a second model of other tokens, or of a shorter context than is needed.
    """
    kind, tokens = arguments.drafts
    attention = _attention(checkpoint, state, tokens + 1)
    if kind == choices.NGRAM:
        text, _ = pad_prompts(prompts)
        room = jnp.pad(jnp.asarray(text), ((0, 0), (0, arguments.tokens)))
        return Drafts(kind, look_up(tokens), room, None, attention)
    draft = load(arguments.draft, settings.dtype(arguments.dtype), stacked=False)
    _require_same_tokens(checkpoint, draft)
    needed, most = max(map(len, prompts)) + arguments.tokens, draft.config.max_position
    if needed > most:
        raise ValueError(f"--draft: got a context of {most} tokens, expected the {needed} needed")
    own_flags = copy.copy(arguments)
    own_flags.allocation = own_flags.calibration = None  # they are of the other model
    own, past = settings.empty_past(own_flags, draft.config, len(prompts), state.capacity)
    _, _, own = read(draft.model, prompts, own, past, chunk=arguments.chunk)
    return Drafts(draft.name, by_model(tokens, past), own, draft.model, attention)


def answer(
    call: tuple, drafts: Drafts, *, max_tokens: int, sampling: Sampling
) -> tuple[Generation, dict]:
    """What was generated, and what it took, for people on standard error and as data.

    Raises:
      ValueError: an answer that its row has no room for.
    """
    made = speculate.decode(
        *call, drafts.drafter, drafts.own,
        draft_model=drafts.model, max_tokens=max_tokens, sampling=sampling,
    )  # fmt: skip
    refuse_overflow(made.generation.state)
    numbers = {name: np.asarray(getattr(made, name)) for name in ("passes", "drafted", "accepted")}
    passes, drafted, accepted = (int(x.sum()) for x in numbers.values())
    share = f" ({accepted / drafted:.0%})" if drafted else ""
    said = (
        f"turboquant-jax: {int(made.generation.counts.sum())} tokens in {passes} passes behind the "
        f"prompts'; {accepted} of {drafted} drafted tokens accepted{share}"
    )
    print(said, file=sys.stderr)
    about = {"draft": drafts.name, "tokens": drafts.drafter.tokens, "attention": drafts.attention}
    return made.generation, about | {name: x.tolist() for name, x in numbers.items()}


def _attention(checkpoint: Checkpoint, state: Any, queries: int) -> str | None:
    """What attends to so many tokens of a sequence; said, where it is not what attends to one."""
    if not isinstance(state, Cache):
        return None
    softcap = checkpoint.config.attention_softcap
    one, several = (choose_attention(state, n, softcap, None).attend for n in (1, queries))
    if one != several:
        what = "XLA's definition" if several == "xla" else several
        print(
            f"turboquant-jax: passes of {queries} tokens attend by {what}, of one by {one}",
            file=sys.stderr,
        )
    return several


def _require_same_tokens(checkpoint: Checkpoint, draft: Checkpoint) -> None:
    ours, theirs = checkpoint.config.vocab_size, draft.config.vocab_size
    if ours != theirs:
        raise ValueError(f"--draft: got a vocabulary of {theirs}, expected the model's {ours}")
    if checkpoint.tokenizer.backend.get_vocab() != draft.tokenizer.backend.get_vocab():
        raise ValueError("--draft: got a tokenizer of other tokens, expected the model's")
