"""Text to token ids and back; from the files of a Hugging Face folder (GGUF: `gguf_tokenizer`)."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from turboquant_jax.models.chat import ChatTemplate, template_from_folder
from turboquant_jax.models.streaming import stream_text


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers.Tokenizer` with what a checkpoint says beside it.

    `bos` is put before plain text when the checkpoint asks for it, never before a chat: chat
    templates write it themselves. Special tokens written out in a text are read as such.
    Generation stops at `eos_ids`, which are the model's.
    Every method raises ValueError where the tokenizers package fails.
    """

    backend: tokenizers.Tokenizer
    bos_id: int | None
    eos_ids: tuple[int, ...]
    adds_bos: bool
    chat_template: ChatTemplate | None

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, the start token first if the checkpoint wants one."""
        ids = self.encode_rendered(text)
        return [self.bos_id, *ids] if self.adds_bos and self.bos_id is not None else ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        with refusing():
            return self.backend.decode(list(ids), skip_special_tokens=True)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Pieces of text as soon as they are final; joined they are `decode(ids)`."""
        return stream_text(self.backend, ids, self.decode)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Token ids of `apply_chat`."""
        return self.encode_rendered(self.apply_chat(messages, **options))

    def apply_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The conversation as the checkpoint's own template writes it, rendered in a sandbox.

        By default it ends with the header of the assistant's answer; the options are those of
        `ChatTemplate.render`. Raises ValueError if the checkpoint has no template or the template
        fails on these messages.
        """
        if self.chat_template is None:
            raise ValueError("got a checkpoint without a chat template, expected one with it")
        return self.chat_template.render(messages, **options)

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of a text that a template has rendered: nothing is put before it."""
        with refusing():
            return self.backend.encode(text, add_special_tokens=False).ids


@contextlib.contextmanager
def refusing(what: str = "tokenizer", expected: str = "one that serves this") -> Iterator[None]:
    """ValueError for what the package raises: a bare Exception, or the panic of its Rust code.

    A damaged tokenizer may be read whole and fail at its first use.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: got {error}, expected {expected}") from error


def require_rows(tokenizer: Tokenizer, rows: int) -> None:
    """ValueError if a token has no row in the embedding: JAX would take another row for it."""
    token, largest = max(tokenizer.backend.get_vocab().items(), key=lambda item: item[1])
    if largest >= rows:
        raise ValueError(
            f"token {token!r}: got id {largest}, expected less than the embedding's {rows} rows"
        )


def byte_tokenizer(vocab_size: int, eos_ids: tuple[int, ...] = ()) -> Tokenizer:
    """For models without a text of their own: a byte is its token, token 300 reads "<300>"."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(bytes_):
        raise ValueError(f"vocab_size: got {vocab_size}, expected at least {len(bytes_)}")
    tokens = [*bytes_, *(f"<{i}>" for i in range(len(bytes_), vocab_size))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, None, eos_ids, adds_bos=False, chat_template=None)


def named_tokens(backend: tokenizers.Tokenizer, bos: int | None, eos: int | None) -> dict[str, str]:
    """The texts of the tokens that the checkpoint has, as templates name them."""
    ids = {"bos_token": bos, "eos_token": eos}
    texts = {name: backend.id_to_token(i) for name, i in ids.items() if i is not None}
    return {name: text for name, text in texts.items() if text is not None}


def tokenizer_from_folder(folder: Path, bos_id: int | None, eos_ids: tuple[int, ...]) -> Tokenizer:
    """The `tokenizer.json` of a Hugging Face folder, and the chat template beside it.

    Raises FileNotFoundError where there is none and ValueError where it cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected the tokenizer")
    with refusing(str(path), "a tokenizer.json"):
        backend = tokenizers.Tokenizer.from_file(str(path))
        # What a tokenizer was trained or served with would cut a prompt short without a word.
        backend.no_truncation()
        backend.no_padding()
        first = backend.encode("").ids[:1]
    stop = eos_ids[0] if eos_ids else None
    return Tokenizer(
        backend=backend,
        bos_id=bos_id,
        eos_ids=eos_ids,
        adds_bos=bos_id is not None and first == [bos_id],
        chat_template=template_from_folder(folder, named_tokens(backend, bos_id, stop)),
    )
