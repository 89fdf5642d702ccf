"""Chat templates: what transformers renders of them, where they come from, and what they raise."""

import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from tests.models import chat_templates
from turboquant_jax import cli
from turboquant_jax.models.chat import ChatTemplate, template_from_folder, template_from_gguf

USER = [{"role": "user", "content": "a"}]
RENDERED = json.loads((chat_templates.FOLDER / "rendered.json").read_text("utf-8"))


def render(template, conversation, prompt):
    options = dict(chat_templates.CONVERSATIONS[conversation])
    chat = ChatTemplate(chat_templates.TEMPLATES[template], chat_templates.TOKENS)
    return chat.render(options.pop("messages"), add_generation_prompt=prompt, **options)


@pytest.mark.parametrize("template", chat_templates.TEMPLATES)
def test_a_template_renders_as_by_transformers(template):
    for case, expected in zip(chat_templates.CASES, RENDERED, strict=True):
        if case[0] == template:
            assert render(*case) == expected


@pytest.mark.reference
def test_transformers_renders_what_is_expected():
    pytest.importorskip("transformers")
    for case, expected in zip(chat_templates.CASES, RENDERED, strict=True):
        assert chat_templates.by_transformers(*case) == expected


def test_tools_and_documents_are_none_without_any():
    text = "{{ tools is none }} {{ documents is none }} {{ tools is defined }} {{ pad_token }}"
    assert ChatTemplate(text).render(USER) == "True True True "
    assert ChatTemplate(text).render(USER, tools=[]) == "False True True "


def test_json_in_a_prompt_is_not_that_of_a_web_page():
    text = "{{ messages[0].content | tojson }}"
    said = [{"role": "user", "content": {"b": "<é&'>", "a": 1}}]
    assert ChatTemplate(text).render(said) == '{"b": "<é&\'>", "a": 1}'


def test_a_conversation_with_tools_may_have_a_template_of_its_own():
    chat = ChatTemplate("plain", tool_text="{{ tools[0].name }}")
    assert chat.render(USER) == "plain"
    assert chat.render(USER, tools=[{"name": "clock"}]) == "clock"
    assert ChatTemplate("plain").render(USER, tools=[{"name": "clock"}]) == "plain"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ missing.attribute }}", "UndefinedError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ range(10 ** 9) | list }}", "OverflowError"),
        ("{{ '%d' % 'a' }}", "TypeError"),
        ("{{ 'a'.encode('ascii').decode('no such') }}", "LookupError"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "RecursionError"),
        ("{{ 0 | tojson(indent=messages) }}", "TypeError"),
    ],
)
def test_whatever_a_template_raises_is_one_refusal(text, message):
    with pytest.raises(ValueError, match=f"chat template: got .*{message}") as caught:
        ChatTemplate(text).render(USER)
    assert "\n" not in str(caught.value)


def test_the_command_answers_a_bad_template_in_one_line(folder, capsys):
    (folder / "chat_template.jinja").write_text("{{ messages[0].content + 1 }}")
    call = ["generate", "--model", str(folder), "--rotation", "haar", "a"]
    assert cli.main(call) == 2
    error = capsys.readouterr().err
    assert error.startswith("turboquant-jax: chat template: got TypeError(")
    assert error.count("\n") == 1


def write(folder, **files):
    for name, entries in files.items():
        (folder / f"{name}.json").write_text(json.dumps(entries), "utf-8")


def tokens(folder):
    chat = template_from_folder(folder, {"bos_token": "<model>", "eos_token": "<text end>"})
    return chat.special_tokens


def test_the_tokens_of_a_template_are_those_of_its_tokenizer(tmp_path):
    """Not the model's, which are for stopping; those only where no file names any."""
    (tmp_path / "chat_template.jinja").write_text("t")
    assert tokens(tmp_path) == {"bos_token": "<model>", "eos_token": "<text end>"}
    write(tmp_path, tokenizer_config={"eos_token": "<turn end>", "bos_token": None})
    assert tokens(tmp_path) == {"eos_token": "<turn end>"}
    long = {"__type": "AddedToken", "content": "<é>", "lstrip": False}
    write(tmp_path, tokenizer_config={"eos_token": long, "unk_token": "?", "added": "x"})
    assert tokens(tmp_path) == {"eos_token": "<é>", "unk_token": "?"}


def test_old_folders_name_their_tokens_in_a_file_of_their_own(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("t")
    old = {"pad_token": {"content": "<pad>"}, "eos_token": "<old>"}
    write(tmp_path, tokenizer_config={"eos_token": "<new>"}, special_tokens_map=old)
    assert tokens(tmp_path) == {"pad_token": "<pad>", "eos_token": "<old>"}
    write(tmp_path, tokenizer_config={"eos_token": "<new>", "added_tokens_decoder": {}})
    assert tokens(tmp_path) == {"eos_token": "<new>"}


def test_llama_tokenizers_have_names_that_no_file_gives(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("t")
    write(tmp_path, tokenizer_config={"tokenizer_class": "LlamaTokenizer", "eos_token": "<e>"})
    assert tokens(tmp_path) == {"bos_token": "<s>", "eos_token": "<e>", "unk_token": "<unk>"}


@pytest.mark.reference
@pytest.mark.parametrize(
    "files",
    [
        dict(tokenizer_config={"eos_token": "<e>", "bos_token": None}),
        dict(tokenizer_config={"eos_token": {"__type": "AddedToken", "content": "<e>"}}),
        dict(tokenizer_config={"eos_token": "<n>"}, special_tokens_map={"eos_token": "<e>"}),
        dict(
            tokenizer_config={"eos_token": "<n>", "added_tokens_decoder": {}},
            special_tokens_map={"eos_token": "<e>", "pad_token": "<p>"},
        ),
    ],
)
def test_transformers_names_the_same_tokens(tmp_path, files):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}|{{ eos_token }}|{{ pad_token }}")
    Backend(models.WordLevel({"?": 0}, "?")).save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, **files)
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    expected = reference.apply_chat_template(USER, tokenize=False)
    assert template_from_folder(tmp_path, {}).render(USER) == expected


def test_where_a_folder_keeps_its_templates(tmp_path):
    def texts():
        chat = template_from_folder(tmp_path, {})
        return chat and (chat.text, chat.tool_text)

    assert texts() is None
    write(tmp_path, tokenizer_config={})
    assert texts() is None
    write(tmp_path, tokenizer_config={"chat_template": "one"})
    assert texts() == ("one", None)
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "two"}]
    write(tmp_path, tokenizer_config={"chat_template": named})
    assert texts() == ("two", "t")
    write(tmp_path, tokenizer_config={"chat_template": named[:1]})
    assert texts() is None
    (tmp_path / "chat_template.jinja").write_text("drei £", "utf-8")
    assert texts() == ("drei £", None)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert texts() == ("drei £", "tools")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: got .*, expected JSON"),
        ("tokenizer_config.json", "[" * 100_000, "expected JSON"),
        ("tokenizer_config.json", "[]", "got a list, expected a JSON object"),
        ("tokenizer_config.json", '{"chat_template": [3]}', "expected JSON with a template"),
        ("tokenizer_config.json", '{"chat_template": 3}', "expected JSON with a template"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "a"}]}', "KeyError"),
        ("tokenizer_config.json", '{"chat_template": "a", "eos_token": 3}', "eos_token: got 3"),
        ("special_tokens_map.json", "3", "got a int, expected a JSON object"),
        ("chat_template.jinja", "\xff", r"chat_template\.jinja: got .*, expected UTF-8"),
    ],
)
def test_what_is_no_template_is_refused(tmp_path, name, content, message):
    write(tmp_path, tokenizer_config={"chat_template": "a"})
    (tmp_path / name).write_text(content, "latin-1")
    with pytest.raises(ValueError, match=message) as caught:
        template_from_folder(tmp_path, {})
    assert str(tmp_path) in str(caught.value)


def test_templates_of_a_gguf_file():
    assert template_from_gguf({}, {}) is None
    key = "tokenizer.chat_template"
    chat = template_from_gguf({key: "{{ eos_token }}", f"{key}.tool_use": "t"}, {"eos_token": "e"})
    assert (chat.render(USER), chat.tool_text) == ("e", "t")
    with pytest.raises(ValueError, match=r"tokenizer\.chat_template: got 3, expected the text"):
        template_from_gguf({key: 3}, {})
