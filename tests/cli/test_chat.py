"""Conversations and stop strings: a kept past answers as one that reads everything anew does."""

import io
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from turboquant_jax import cli
from turboquant_jax.models import conversation, dense, load
from turboquant_jax.models.conversation import Conversation
from turboquant_jax.models.decoding import generate
from turboquant_jax.models.options import Sampling

TOKENS = 6


@pytest.fixture
def checkpoint(folder):
    return load(folder(), stacked=False)


def start(checkpoint, capacity=256, **options):
    def empty(capacity):
        return dense.create(checkpoint.config, 1, capacity, jnp.float32), dense.DENSE

    return Conversation(checkpoint, empty, capacity=capacity, **options)


def greedy(checkpoint, ids):
    """The answer to these tokens, all read in one pass."""
    state = dense.create(checkpoint.config, 1, 256, jnp.float32)
    tokens, lengths = jnp.asarray([ids]), jnp.asarray([len(ids)])
    made = generate(
        checkpoint.model, tokens, lengths, jax.random.split(jax.random.key(0), 1), state,
        dense.DENSE, max_tokens=TOKENS,
        sampling=Sampling(eos_ids=tuple(checkpoint.tokenizer.eos_ids)),
    )  # fmt: skip
    return [int(t) for t in np.asarray(made.tokens[0, : int(made.counts[0])]) if t != 301]


def ask(chat, text, **options):
    pieces = chat.ask(text, key=jax.random.key(0), max_tokens=TOKENS, **options)
    return "".join(pieces)


def test_a_turn_reads_only_what_is_new(checkpoint):
    chat = start(checkpoint, messages=[{"role": "system", "content": "sys"}])
    encode = checkpoint.tokenizer.backend.encode
    prompt = encode("<|im_start|>system\nsys<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
                    "<|im_start|>assistant\n", add_special_tokens=False).ids  # fmt: skip
    ask(chat, "Hi")
    assert chat.read_tokens == len(prompt)
    assert chat.tokens == greedy(checkpoint, prompt)
    assert len(chat.tokens) == TOKENS, "this model's first answer runs to the end"
    rest = encode("<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n",
                  add_special_tokens=False).ids  # fmt: skip
    first = chat.tokens
    ask(chat, "And?")
    assert chat.read_tokens == len(rest) + 1, "the newest token had not been read"
    assert chat.tokens == greedy(checkpoint, [*prompt, *first, *rest])
    assert [m["role"] for m in chat.messages] == ["system", *["user", "assistant"] * 2]


@pytest.mark.parametrize("how", ["stop", "close"])
def test_a_turn_after_an_answer_that_ended_early(checkpoint, how):
    """Cut at a stop string, all is read again; closed, it goes on with what was drawn."""
    chat = start(checkpoint)
    whole = ask(chat, "Hi")
    chat = start(checkpoint)
    if how == "stop":
        said = ask(chat, "Hi", ends=[whole[3:5]])
        assert said == whole[: whole.find(whole[3:5])]
    else:
        pieces = chat.ask("Hi", key=jax.random.key(0), max_tokens=TOKENS)
        said = next(pieces)
        pieces.close()
    assert chat.messages[-1] == {"role": "assistant", "content": said}
    drawn = chat.tokens
    ask(chat, "And?")
    text = checkpoint.tokenizer.apply_chat(chat.messages[:-1])
    ids = checkpoint.tokenizer.backend.encode(text, add_special_tokens=False).ids
    assert chat.read_tokens == (len(ids) if how == "stop" else len(ids) - _read(text, said, drawn))
    if how == "stop":
        assert chat.tokens == greedy(checkpoint, ids)


def _read(text, said, drawn):
    """Tokens that the past had: of the text before the answer (all ASCII), and of the answer."""
    before = text[: text.index(said, text.index("assistant"))]
    return len(before.replace("<|im_start|>", "s").replace("<|im_end|>", "e")) + len(drawn) - 1


def test_a_conversation_without_room_says_so_and_starts_again(checkpoint):
    chat = start(checkpoint, capacity=48)
    ask(chat, "Hi")
    with pytest.raises(ValueError, match=r"^row 0: .* its capacity of 48$"):
        ask(chat, "x" * 40)
    assert len(chat.messages) == 2, "what could not be read was not said"
    chat.messages.clear()
    assert ask(chat, "Hi") == ask(start(checkpoint, capacity=48), "Hi")


def test_a_past_that_is_not_told_its_room_grows(checkpoint, monkeypatch):
    """To 32 tokens for 21 and 6; for 53 in all to 64, and everything is read again."""
    monkeypatch.setattr(conversation, "SMALLEST", 16)
    grows, large = start(checkpoint, capacity=None), start(checkpoint)
    for said, room in (("Hi", 32), ("And?", 64)):
        assert ask(grows, said) == ask(large, said)
        assert grows.capacity == room
    assert grows.read_tokens == 21 + TOKENS + 25 > large.read_tokens == 26


def test_the_command_answers_line_by_line(folder, monkeypatch, capsys, tmp_path):
    out = tmp_path / "chat.json"
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n\nAnd?\n"))
    flags = ["--model", str(folder()), "--tokens", str(TOKENS), "--bits", "16"]
    assert cli.main(["chat", *flags, "--json", str(out)]) == 0
    turns = json.loads(out.read_text())["turns"]
    assert [turn["prompt"] for turn in turns] == ["Hi", "And?"]
    assert capsys.readouterr().out == "".join(f"{turn['text']}\n" for turn in turns)
    # the newest token, <|im_end|>, a line feed, and two letters more
    assert turns[1]["read_tokens"] == turns[0]["read_tokens"] + 5


def test_stop_strings_end_every_kind_of_answer(folder, capsys, tmp_path):
    out, prompts = tmp_path / "out.json", tmp_path / "prompts.txt"
    prompts.write_text("Hi\nHo\n")
    flags = ["--model", str(folder()), "--tokens", "8", "--bits", "16", "--json", str(out)]

    def texts(*arguments):
        assert cli.main(["generate", *arguments, *flags]) == 0
        return [answer["text"] for answer in json.loads(out.read_text())["answers"]]

    whole = texts("--prompts", str(prompts))
    stop = whole[0][2:4]
    expected = [text.split(stop)[0].strip() for text in whole]
    assert expected[0] != whole[0]
    assert texts("--prompts", str(prompts), "--stop", stop) == expected
    capsys.readouterr()
    assert texts("Hi", "--stream", "--stop", stop, "--stop", "never") == expected[:1]
    assert capsys.readouterr().out.strip() == expected[0]


def test_head_dims_that_are_no_power_of_two(folder, capsys, tmp_path):
    """By default the rotation that serves them; the sink and window of 4 and 8 leave some to it."""
    out, path = tmp_path / "out.json", folder(head_dim=12)
    flags = ["--tokens", "3", "--window", "8", "--json", str(out)]
    assert cli.main(["generate", "x" * 90, "--model", str(path), *flags]) == 0
    assert json.loads(out.read_text())["rotation"] == "haar"
    assert "head dim 12 is no power of two: haar rotation" in capsys.readouterr().err
    assert cli.main(["generate", "x", "--model", str(path), "--rotation", "hadamard"]) == 2
    assert "dim: got 12, expected a power of two" in capsys.readouterr().err
