"""Prompts, conversations and standard input: what counts as a line, and what is refused."""

import io
import json
import sys
from types import SimpleNamespace

import pytest

from turboquant_jax.cli import texts


def asked(**given):
    defaults = dict.fromkeys(("prompt", "prompts", "messages", "system"))
    return SimpleNamespace(**(defaults | {"plain": False} | given))


def test_a_line_ends_at_a_line_feed_alone(tmp_path):
    """As editors write them: a byte order mark is none of the prompt, a form feed is."""
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufefffirst\u2028still\r\n\r\n \nse\fco\x0bnd\x85\u2029\x1c\rend".encode())
    assert texts.lines(path) == ["first\u2028still", "se\fco\x0bnd\x85\u2029\x1c\rend"]


def test_a_conversation_comes_from_json(tmp_path):
    path = tmp_path / "messages.json"
    said = [{"role": "user", "content": "a\u2028b", "name": None}]
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(said).encode())
    assert texts.read(asked(messages=path)) == [said]
    system = {"role": "system", "content": "be brief"}
    assert texts.read(asked(messages=path, system="be brief")) == [[system, *said]]
    user = {"role": "user", "content": "x"}
    assert texts.read(asked(prompt="x", system="be brief")) == [[system, user]]
    assert texts.read(asked(system="be brief")) == [[system]]


@pytest.mark.parametrize("content", ["{", "{}", "[]", '["x"]', '[{"content": "x"}]'])
def test_other_json_is_no_conversation(content, tmp_path):
    path = tmp_path / "messages.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"messages\.json: got"):
        texts.messages(path)


@pytest.mark.parametrize(
    ("data", "prompt"), [(b"two\nlines\r\n", "two\nlines"), (b"\xef\xbb\xbfx\n\n", "x\n")]
)
def test_a_dash_is_standard_input(data, prompt, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert texts.read(asked(prompt="-")) == [prompt]


@pytest.mark.parametrize(
    ("data", "says"), [(b" \n", "got no text"), (b"\xff\xfe", "expected UTF-8 text")]
)
def test_standard_input_without_a_prompt_is_refused(data, says, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    with pytest.raises(ValueError, match=says):
        texts.read(asked(prompt="-"))
