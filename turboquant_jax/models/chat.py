"""Chat templates: what transformers renders, from the files of a checkpoint, in a sandbox.

A template is code that came with the weights. It sees the messages and what transformers gives it,
and nothing else.
"""

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
from jinja2 import nodes
from jinja2.ext import Extension

from turboquant_jax.models.files import read_json_object, read_text

# What a template may call by name, of those in `tokenizer_config.json`.
_SPECIAL_TOKENS = tuple(
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)
# Tokenizers of these classes have names for their tokens even where no file says so.
_LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
_LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template of a conversation, and the special tokens that it may name.

    `tool_text`, where a checkpoint has it, is taken for a conversation with tools.
    `special_tokens` are those of `tokenizer_config.json`: the end of a turn is often not the
    token at which the model stops.
    """

    text: str
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tool_text: str | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The conversation as text.

        `messages` have `role` and `content`; keys that hold None are left out. `tools` are JSON
        schemas. `variables` are what else a template knows, such as `enable_thinking`.
        Raises ValueError for whatever the template raises.
        """
        text = self.text if tools is None or self.tool_text is None else self.tool_text
        said = [{k: v for k, v in message.items() if v is not None} for message in messages]
        try:
            template = _environment().from_string(text)
            return template.render(
                **{**self.special_tokens, **variables},
                messages=said,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template is a program, and raises what it likes
            raise ValueError(f"chat template: got {error!r}, expected it to render") from error


def template_from_folder(folder: Path, fallback: Mapping[str, str]) -> ChatTemplate | None:
    """The templates of a Hugging Face folder; None where it has none for an ordinary chat.

    They are files of their own, or lie in `tokenizer_config.json`. `fallback` are the special
    tokens of a folder without that file. Raises ValueError for files of another form.
    """
    path = folder / "tokenizer_config.json"
    config = read_json_object(path) if path.is_file() else None
    texts = _template_files(folder) or _template_entries(path, (config or {}).get("chat_template"))
    if "default" not in texts:
        return None
    tokens = fallback if config is None else _special_tokens(folder, config)
    return ChatTemplate(texts["default"], tokens, texts.get("tool_use"))


def _template_files(folder: Path) -> dict[str, str]:
    paths = {p.stem: p for p in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    default = folder / "chat_template.jinja"
    if default.is_file():
        paths["default"] = default
    return {name: read_text(path) for name, path in paths.items()}


def _template_entries(path: Path, entry: Any) -> dict[str, str]:
    """A template, or a list of named ones."""
    found = [{"name": "default", "template": entry}] if isinstance(entry, str) else entry or []
    try:
        texts = {named["name"]: named["template"] for named in found}
        if not all(isinstance(text, str) for text in (*texts, *texts.values())):
            raise TypeError("a template that is no text")
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: got {error!r}, expected JSON with a template") from error
    return texts


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Those that the files name; old checkpoints name them in a file of their own."""
    path = folder / "special_tokens_map.json"
    old = "added_tokens_decoder" not in config and path.is_file()
    usual = _LLAMA_TOKENS if config.get("tokenizer_class") in _LLAMA_CLASSES else {}
    entries = {**usual, **config, **(read_json_object(path) if old else {})}
    texts: dict[str, str] = {}
    for name in _SPECIAL_TOKENS:
        token = entries.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            texts[name] = text
        elif token is not None:
            raise ValueError(f"{folder}: {name}: got {token!r}, expected a token's text")
    return texts


def template_from_gguf(
    metadata: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> ChatTemplate | None:
    """The templates in the metadata of a GGUF file; ValueError where they are no text."""
    key = "tokenizer.chat_template"
    texts = [metadata.get(name) for name in (key, f"{key}.tool_use")]
    for text in texts:
        if not isinstance(text, str | None):
            raise ValueError(f"{key}: got {text!r}, expected the text of a template")
    default, tool_use = texts
    return None if default is None else ChatTemplate(default, special_tokens, tool_use)


def _environment() -> jinja2.Environment:
    """The surroundings that chat templates are written for."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


class _Generation(Extension):
    """`{% generation %}`: marks the assistant's words for training, and renders as its body."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Any) -> nodes.Node:
        """A call with the body, so that what is set inside stays inside, as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return caller()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes for HTML and sorts the keys; a prompt is no web page."""
    options: dict[str, Any] = dict(indent=indent, separators=separators, sort_keys=sort_keys)
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
