"""The tokenizers in the metadata of GGUF files: byte-level merges, and SentencePiece's BPE."""

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from turboquant_jax.models.chat import template_from_gguf
from turboquant_jax.models.splitting import splitting_named, splitting_of_merges
from turboquant_jax.models.tokenizer import Tokenizer, named_tokens, refusing

_KEY = "tokenizer.ggml."
# tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPACE = "\u2581"  # SentencePiece's letter for a space


def tokenizer_from_gguf(metadata: Mapping[str, Any], eos_ids: tuple[int, ...]) -> Tokenizer:
    """The tokenizer in the metadata of a GGUF file, as llama.cpp reads it.

    Serves `gpt2` (byte-level) with the pre-tokenizers of `splitting`, or with none named where the
    merges tell it, and `llama` (SentencePiece's BPE); raises ValueError for any other.
    """
    kinds = {"gpt2": _byte_level, "llama": _sentencepiece}
    model = metadata.get(f"{_KEY}model")
    if not isinstance(model, str) or model not in kinds:
        raise ValueError(f"{_KEY}model: got {model!r}, expected 'gpt2' or 'llama'")
    tokens, types = _table(metadata, "tokens", str), _table(metadata, "token_type", int)
    if len(tokens) != len(types):
        raise ValueError(f"got {len(tokens)} tokens with {len(types)} types, expected one each")
    backend, adds_bos = kinds[model](metadata, tokens, types)
    special = (_CONTROL,) if model == "gpt2" else (_CONTROL, _UNKNOWN)
    backend.add_special_tokens([_added(t) for t in _of_type(tokens, types, *special)])
    backend.add_tokens([_added(t) for t in _of_type(tokens, types, _USER_DEFINED)])
    bos, eos = (metadata.get(f"{_KEY}{name}_token_id") for name in ("bos", "eos"))
    return Tokenizer(
        backend=backend,
        bos_id=bos,
        eos_ids=eos_ids,
        adds_bos=bool(metadata.get(f"{_KEY}add_bos_token", adds_bos)),
        chat_template=template_from_gguf(metadata, named_tokens(backend, bos, eos)),
    )


def _byte_level(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int]
) -> tuple[tokenizers.Tokenizer, bool]:
    """A byte is a letter; words are cut by a pattern, then merged in the order of the file."""
    merges, pre = _table(metadata, "merges", str), metadata.get(f"{_KEY}pre")
    splitting = splitting_of_merges(merges) if pre is None else splitting_named(pre)
    with refusing(f"{_KEY}merges", "merges of two known tokens"):
        pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
        model = models.BPE(_ids(tokens), pairs, ignore_merges=splitting.whole_words)
    backend = tokenizers.Tokenizer(model)
    if splitting.normalizer is not None:
        backend.normalizer = splitting.normalizer
    backend.pre_tokenizer = splitting.pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    return backend, splitting.adds_bos


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int]
) -> tuple[tokenizers.Tokenizer, bool]:
    """The two neighbours whose union has the best score become one, until none is a token.

    A character without a token is written as its bytes. A text, and what follows a special token,
    begins with a space of its own unless the file says otherwise; decoding drops it.
    """
    if metadata.get(f"{_KEY}remove_extra_whitespaces", False) is not False:
        raise ValueError(f"{_KEY}remove_extra_whitespaces: got True, expected False")
    unknown = _of_type(tokens, types, _UNKNOWN)
    if not (unknown or {f"<0x{byte:02X}>" for byte in range(256)} <= set(tokens)):
        raise ValueError(f"{_KEY}tokens: got neither an unknown token nor every byte")
    with refusing(f"{_KEY}scores", "a number for each token"):
        model = models.BPE(
            _ids(tokens),
            _merges_by_score(tokens, types, _table(metadata, "scores", float)),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    backend = tokenizers.Tokenizer(model)
    prefixed = bool(metadata.get(f"{_KEY}add_space_prefix", True))
    first = [normalizers.Prepend(_SPACE)] if prefixed else []
    backend.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", _SPACE)])
    last = [decoders.Strip(" ", 1, 0)] if prefixed else []
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *last])
    return backend, True


def _merges_by_score(
    tokens: list[str], types: list[int], scores: list[float]
) -> list[tuple[str, str]]:
    """Every way to make a token of two others, the best token first."""
    score = dict(zip(tokens, scores, strict=True))
    made: list[tuple[float, float, float, str, str]] = []
    for token in _of_type(tokens, types, _NORMAL):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in score and right in score:
                made.append((-score[token], -score[left], -score[right], left, right))
    made.sort(key=lambda merge: merge[:3])
    return [merge[3:] for merge in made]


def _of_type(tokens: list[str], types: list[int], *wanted: int) -> list[str]:
    return [token for token, kind in zip(tokens, types, strict=True) if kind in wanted]


def _ids(tokens: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def _added(token: str) -> AddedToken:
    return AddedToken(token, normalized=False)


def _table(metadata: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    table = metadata.get(_KEY + name)
    if not isinstance(table, list) or not all(type(entry) is kind for entry in table):
        found = "a list" if isinstance(table, list) else repr(table)
        raise ValueError(f"{_KEY}{name}: got {found}, expected a list of {kind.__name__}")
    return table
