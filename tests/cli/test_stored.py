"""The saved cache of a prompt: continued as if read anew, refused where it does not belong."""

import json

import pytest

from turboquant_jax import cli
from turboquant_jax.models import stored

DOCUMENT = [{"role": "user", "content": "It was a dark night."}]
LONGER = [*DOCUMENT, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]


@pytest.fixture
def run(folder, tmp_path):
    """`run(messages, *flags)`: exit status and numbers of an answer to this conversation."""
    path, out = folder(), tmp_path / "out.json"

    def run(said, *flags):
        (tmp_path / "messages.json").write_text(json.dumps(said))
        given = ["--messages", str(tmp_path / "messages.json"), "--model", str(path)]
        code = cli.main(["generate", *given, "--tokens", "5", "--json", str(out), *flags])
        return code, json.loads(out.read_text()) if code == 0 else None

    return run


def test_a_saved_prompt_goes_on_where_it_ended(run, tmp_path, capsys):
    file = tmp_path / "night.cache"
    saved = run(DOCUMENT, "--save-cache", str(file))[1]
    header = stored.open_header(file)
    # the document, <|im_end|> and \n, but not <|im_start|> and "assistant\n"
    assert len(header.tokens) == saved["prompt_tokens"][0] - 1 - len("assistant\n")
    assert (saved["loaded_tokens"], header.capacity) == (0, 256)
    for said, anew in ((DOCUMENT, saved), (LONGER, run(LONGER)[1])):
        loaded = run(said, "--load-cache", str(file))[1]
        assert loaded["answers"] == anew["answers"]
        assert loaded["loaded_tokens"] == len(header.tokens)
    # and what does not belong to it
    for said, flags, says in (
        ([{"role": "user", "content": "It was a bright day"}], [], "begins with 15 of them"),
        (LONGER, ["--bits", "3"], "expected {"),
        (LONGER, ["--tokens", "200"], "expected at most the capacity of 256"),
    ):
        capsys.readouterr()
        assert run(said, "--load-cache", str(file), *flags)[0] == 2
        assert says in capsys.readouterr().err
    file.write_bytes(file.read_bytes()[:-9])
    assert run(LONGER, "--load-cache", str(file))[0] == 2
    assert "night.cache: got" in capsys.readouterr().err


def test_another_model_s_cache_is_refused(run, folder, tmp_path, capsys):
    file = tmp_path / "night.cache"
    code, result = run(DOCUMENT, "--save-cache", str(file), "--tokens", "0")
    assert (code, result["answers"]) == (0, []), "saved without an answer"
    given = ["x", "--load-cache", str(file), "--model", str(folder(head_dim=8))]
    assert cli.main(["generate", *given]) == 2
    assert "got a cache of tiny-16 " in capsys.readouterr().err


def test_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="expected the saved cache of a prompt"):
        stored.open_header(tmp_path / "x")
