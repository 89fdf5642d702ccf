"""Text out of tokens as they come, so that the pieces joined are what decoding them all gives.

A decoder of the tokenizers package may change its mind about what it has said: the bytes of a
character come one by one, and a run of byte tokens is read as a whole. So text is held back while
the next token could still change it, and a decoder that is not known here speaks at the end.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import tokenizers

# Each works on a token alone, knowing at most whether it is the first.
_BY_TOKEN = ("Replace", "ByteFallback", "Metaspace", "WordPiece", "Strip")
_JOINING = ("ByteLevel", "Fuse")
_BYTE = re.compile("<0x..>", re.DOTALL)
_UNREADABLE = "\ufffd"  # at the end of a text: perhaps the first bytes of a character


def stream_text(
    backend: tokenizers.Tokenizer, ids: Iterable[int], decode: Callable[[Sequence[int]], str]
) -> Iterator[str]:
    """Pieces of text, none empty, as soon as they are final; joined they are `decode(ids)`.

    `decode` is that of `backend`, special tokens left out.
    """
    special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    gradual = _is_gradual(backend)
    before: list[int] = []  # tokens already said, enough that the next are not the first of a text
    said = ""  # the text of `before`
    held: list[int] = []
    for token in map(int, ids):
        written = backend.id_to_token(token)
        if written is None or written in special:
            continue  # `decode` leaves it out
        held.append(token)
        if not gradual or _BYTE.fullmatch(written):
            continue
        text = decode([*before, *held])
        if text == said or text.endswith(_UNREADABLE):
            continue
        yield text[len(said) :]
        alone = decode(held)
        before, said = (held, alone) if alone else ([*before, *held], text)
        held = []
    rest = decode([*before, *held])[len(said) :]
    if rest:
        yield rest


def _is_gradual(backend: tokenizers.Tokenizer) -> bool:
    """Whether a text, once its last character is whole and no byte token, stays as it is."""
    if backend.decoder is None:
        return True
    joined = False
    earlier: list[dict[str, Any]] = []
    for step in _steps(json.loads(backend.decoder.__getstate__())):
        kind = step["type"]
        if joined:  # it works on the whole text from here on
            gradual = kind == "Fuse" or (kind == "Strip" and step["stop"] == 0)
        elif kind == "ByteFallback":  # the names of bytes must come to it unchanged
            gradual = all(e.get("pattern") == {"String": "▁"} for e in earlier)
        else:
            gradual = kind in _BY_TOKEN or kind in _JOINING
        if not gradual:
            return False
        joined = joined or kind in _JOINING
        earlier.append(step)
    return True


def _steps(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    else:
        yield decoder
