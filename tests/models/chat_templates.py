"""Chat templates written anew with what the public ones use, and conversations for them.

`chats/rendered.json` has what transformers renders of each; to write it again, where transformers
is installed: `python -m tests.models.chat_templates`.
"""

import itertools
import json
from pathlib import Path

FOLDER = Path(__file__).parent / "chats"
TEMPLATES = {
    name: (FOLDER / f"{name}.jinja").read_text("utf-8")
    for name in (
        "headers",  # as of Llama 3.1: variables that may be missing, tools in the first question
        "instructions",  # as of Mistral v0.3: roles that alternate, a tool written key by key
        "chatml_tools",  # as of Qwen2.5: neighbours looked up by index
        "thinking",  # as of Qwen3: what was thought is cut out by methods of strings
        "chatml",  # as of SmolLM2: one line, a system prompt of its own
        "others",  # generation, macros, loop controls, documents, filters
    )
}
TOKENS = {"bos_token": "<|begin|>", "eos_token": "<|eot|>"}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "température",
            "description": "Say 'how warm' it is: a < b & c > d",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string", "description": '京都 or "Z\u00fcrich"'}},
                "required": ["place"],
            },
            "return": {"type": "number"},
        },
    },
    {"type": "function", "function": {"name": "now", "description": "The time", "parameters": {}}},
]
QUESTION = {"role": "user", "content": '  Où est <b>東京</b>? & "why"\n'}
CALL = {"name": "température", "arguments": {"place": "Tōkyō <1>", "days": [1, 2]}}
CONVERSATIONS = {
    "one question": dict(messages=[QUESTION]),
    "system and turns": dict(
        messages=[
            {"role": "system", "content": " Be brief.\n"},
            QUESTION,
            {"role": "assistant", "content": "<think>\nIn Japan.\n</think>\n\nIn Japan.\n"},
            {"role": "user", "content": "And\nKyōto?"},
            {"role": "assistant", "content": "Too.", "tool_calls": None},
            {"role": "user", "content": "Thanks 🙂"},
        ],
        documents=[{"title": "Maps & <places>", "text": "long"}],
        today="26 Nov 2026",
        enable_thinking=False,
    ),
    "tools": dict(
        messages=[
            {"role": "system", "content": "Use tools."},
            QUESTION,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": CALL, "id": "abcdefgh9"}],
            },
            {"role": "tool", "content": "21.5 °C"},
            {"role": "assistant", "content": "Warm.", "reasoning_content": "\nIt is 21.5.\n"},
        ],
        tools=TOOLS,
        builtin_tools=["code", "search"],
    ),
}
CASES = list(itertools.product(TEMPLATES, CONVERSATIONS, (True, False)))


def by_transformers(template: str, conversation: str, prompt: bool) -> str:
    """What transformers renders."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, "?")), **TOKENS
    )
    options = dict(CONVERSATIONS[conversation])
    return tokenizer.apply_chat_template(
        options.pop("messages"),
        chat_template=TEMPLATES[template],
        tokenize=False,
        add_generation_prompt=prompt,
        **options,
    )


if __name__ == "__main__":
    rendered = [by_transformers(*case) for case in CASES]
    text = json.dumps(rendered, indent=1, ensure_ascii=False) + "\n"
    (FOLDER / "rendered.json").write_text(text, "utf-8")
