"""A conversation over a past that is kept: a turn reads only what it adds.

What the past holds is known as text, the rendered conversation so far. Where the next turn renders
to the same beginning, which chat templates usually do, only the rest is read; where it does not (a
template that rewrites what was said, an answer cut at a stop string), all is read again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Array, Key

from turboquant_jax.models import stops
from turboquant_jax.models.checkpoint import Checkpoint
from turboquant_jax.models.decoding import read, steps
from turboquant_jax.models.generate import Past
from turboquant_jax.models.options import GREEDY, Sampling

SMALLEST = 512
"""Tokens that a past has room for at first, unless it has to be another number."""


class Conversation:
    """Messages, and the past that has read them. It changes with every turn.

    Attributes:
      messages: what was said, an answer that ended early included.
      capacity: tokens that the past has room for. Unless it is given, it doubles when a turn needs
        more, up to the model's context; all is read again then.
      read_tokens: tokens of the last turn that were read before its answer.
      tokens: tokens of the last answer, without the one that stops it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        empty: Callable[[int], tuple[Any, Past]],
        *,
        messages: Sequence[Mapping[str, Any]] = (),
        capacity: int | None = None,
        chunk: int = 512,
    ):
        """`empty(capacity)` makes an empty past of one row; `messages` precede the first turn."""
        self._checkpoint, self._empty, self._chunk = checkpoint, empty, chunk
        self._state: Any = None
        self._past: Any = None
        self._text = ""  # what past and `_unread` hold; empty where that is nothing of use
        self._count = 0
        self._unread: list[int] = []
        self._fixed, self.capacity = capacity, 0
        self.messages = list(messages)
        self.read_tokens = 0
        self.tokens: list[int] = []

    def ask(
        self,
        text: str,
        *,
        key: Key[Array, ""],
        max_tokens: int,
        sampling: Sampling = GREEDY,
        ends: Sequence[str] = (),
    ) -> Iterator[str]:
        """The answer, in pieces that are final; closing the iterator ends it early.

        `ends` are stop strings, which are not part of it.

        Raises:
          ValueError: a conversation that the template refuses or that there is no room for. What
            could not be read is not in `messages`, and the next turn reads everything again.
        """
        said = [*self.messages, {"role": "user", "content": text}]
        prompt = self._checkpoint.tokenizer.apply_chat(said)
        new = self._new_tokens(prompt, max_tokens)
        self._text, self.read_tokens, self.tokens = "", len(new), []
        logits, lengths, self._state = read(
            self._checkpoint.model, [new], self._state, self._past,
            start=self._count, chunk=self._chunk,
        )  # fmt: skip
        self.messages, eos_ids = said, self._checkpoint.tokenizer.eos_ids
        made = steps(
            self._checkpoint.model, logits, lengths, key[None], self._state, self._past,
            max_tokens=max_tokens, sampling=replace(sampling, eos_ids=tuple(eos_ids)),
        )  # fmt: skip
        self._count, self._unread = int(lengths[0]), []
        pieces = self._checkpoint.tokenizer.stream(self._drawn(made, eos_ids))
        whole = True
        try:
            yield from stops.until(pieces, ends)
        except GeneratorExit:  # past and count are those of the newest token
            raise
        except BaseException:  # in the middle of a step: the past is lost
            whole = False
            raise
        finally:
            self._close(prompt, ends, whole)

    def _new_tokens(self, prompt: str, max_tokens: int) -> list[int]:
        """What the past has yet to read of the prompt: the rest of it, or all from empty."""
        encode = self._checkpoint.tokenizer.encode_rendered
        if self._text and prompt.startswith(self._text):
            new = self._unread + encode(prompt[len(self._text) :])
            if self._fixed or self._count + len(new) + max_tokens <= self.capacity:
                return new
        new = encode(prompt)
        doubled = max(SMALLEST, 1 << (len(new) + max_tokens - 1).bit_length())
        self.capacity = self._fixed or min(doubled, self._checkpoint.config.max_position)
        self._count, self._state = 0, None  # the old past goes before the new one is made
        self._state, self._past = self._empty(self.capacity)
        return new

    def _drawn(self, made: Iterator, eos_ids: Sequence[int]) -> Iterator[int]:
        """The tokens of the answer; past and count follow, the newest token not yet in them."""
        for step, self._state in made:
            self._count += len(self._unread)
            token = int(step[0])
            if token in eos_ids:  # the template writes it, or another end, itself
                self._unread = []
                return
            self._unread = [token]
            self.tokens.append(token)
            yield token

    def _close(self, prompt: str, ends: Sequence[str], whole: bool) -> None:
        """Note the answer, and of a whole past, without a stop string in it, what it holds."""
        text = self._checkpoint.tokenizer.decode(self.tokens)
        answer = text[: stops.find(text, ends)]
        self.messages.append({"role": "assistant", "content": answer})
        self._text = prompt + answer if whole and answer == text else ""
