"""Text to token ids and back, from GGUF metadata or the files of a Hugging Face folder."""

import dataclasses
import datetime
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

# GGUF's tokenizer.ggml.token_type.
_CONTROL, _USER_DEFINED = 3, 4

# Llama 3 splits text by this pattern (`pre_tokenizer` of its tokenizer.json).
_LLAMA_3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers.Tokenizer` with what a checkpoint says beside it.

    `bos` is put before plain text when the checkpoint asks for it, never before a chat: chat
    templates write it themselves. Special tokens written out in a text are read as such.
    """

    backend: tokenizers.Tokenizer
    bos_id: int | None
    eos_ids: tuple[int, ...]
    adds_bos: bool
    chat_template: str | None

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, the start token first if the checkpoint wants one."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if self.adds_bos and self.bos_id is not None else ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Pieces of text as soon as they are final: no character is ever split between two."""
        decoder = decoders.DecodeStream(skip_special_tokens=True)
        for token in ids:
            piece = decoder.step(self.backend, int(token))
            if piece:
                yield piece

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, up to and with the header of the assistant's answer."""
        return self.backend.encode(self.apply_chat(messages), add_special_tokens=False).ids

    def apply_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation as the checkpoint's own template writes it, rendered in a sandbox.

        `messages` have `role` and `content`. Raises ValueError if the checkpoint has no template
        or the template fails on these messages.
        """
        if self.chat_template is None:
            raise ValueError("got a checkpoint without a chat template, expected one with it")
        try:
            return (
                _environment()
                .from_string(self.chat_template)
                .render(
                    messages=list(messages),
                    add_generation_prompt=True,
                    bos_token=self._text(self.bos_id),
                    eos_token=self._text(self.eos_ids[0] if self.eos_ids else None),
                )
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"chat template: got {error!r}, expected it to render") from error

    def _text(self, token: int | None) -> str:
        return "" if token is None else self.backend.id_to_token(token) or ""


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


def tokenizer_from_gguf(metadata: Mapping[str, Any], eos_ids: tuple[int, ...]) -> Tokenizer:
    """The byte-level BPE in the metadata of a GGUF file.

    Serves the pre-tokenizers `smollm` and `llama-bpe`; raises ValueError for any other.
    """
    model, pre = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if model != "gpt2" or pre not in ("smollm", "llama-bpe"):
        raise ValueError(
            f"tokenizer.ggml.model, .pre: got {model!r}, {pre!r}, "
            "expected 'gpt2' with 'smollm' or 'llama-bpe'"
        )
    tokens, types = _table(metadata, "tokens"), _table(metadata, "token_type")
    if len(tokens) != len(types):
        raise ValueError(f"got {len(tokens)} tokens with {len(types)} types, expected one each")
    llama_3 = pre == "llama-bpe"
    backend = tokenizers.Tokenizer(_byte_pairs(tokens, _table(metadata, "merges"), llama_3))
    first = (
        pre_tokenizers.Split(Regex(_LLAMA_3_PATTERN), behavior="isolated")
        if llama_3
        else pre_tokenizers.Digits(individual_digits=True)
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not llama_3)
    backend.pre_tokenizer = pre_tokenizers.Sequence([first, byte_level])
    backend.decoder = decoders.ByteLevel()
    typed = list(zip(tokens, types, strict=True))
    backend.add_special_tokens([_added(t, special=True) for t, kind in typed if kind == _CONTROL])
    backend.add_tokens([_added(t, special=False) for t, kind in typed if kind == _USER_DEFINED])
    return Tokenizer(
        backend=backend,
        bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_ids=eos_ids,
        # llama.cpp turns it on for this pre-tokenizer, so files of Llama 3 may leave it out.
        adds_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", llama_3)),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _table(metadata: Mapping[str, Any], name: str) -> list[Any]:
    table = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(table, list):
        raise ValueError(f"tokenizer.ggml.{name}: got {table!r}, expected the tokenizer's tables")
    return table


def _byte_pairs(tokens: list[str], merges: list[str], ignore_merges: bool) -> models.BPE:
    """`ignore_merges`: a word that is in the vocabulary is taken whole, as in Llama 3."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
        return models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=ignore_merges)
    except Exception as error:  # the package raises bare Exception
        raise ValueError(f"got {error}, expected merges of two known tokens") from error


def tokenizer_from_folder(folder: Path, bos_id: int | None, eos_ids: tuple[int, ...]) -> Tokenizer:
    """The `tokenizer.json` of a Hugging Face folder, and the chat template beside it.

    Raises FileNotFoundError where there is none and ValueError where it cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected the tokenizer")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
        raise ValueError(f"{path}: got {error}, expected a tokenizer.json") from error
    return Tokenizer(
        backend=backend,
        bos_id=bos_id,
        eos_ids=eos_ids,
        adds_bos=bos_id is not None and backend.encode("").ids[:1] == [bos_id],
        chat_template=_folder_template(folder),
    )


def _folder_template(folder: Path) -> str | None:
    """`chat_template.jinja`, or the (default) template in `tokenizer_config.json`."""
    own, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if own.is_file():
        return own.read_text()
    if not config.is_file():
        return None
    try:
        template = json.loads(config.read_text()).get("chat_template")
        if isinstance(template, list):
            template = {t["name"]: t["template"] for t in template}.get("default")
        if not isinstance(template, str | None):
            raise TypeError(f"chat_template {template!r}")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{config}: got {error!r}, expected JSON with a template") from error
    return template


def _environment() -> jinja2.Environment:
    """The surroundings that chat templates are written for."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _added(token: str, *, special: bool) -> AddedToken:
    return AddedToken(token, special=special, normalized=False)
