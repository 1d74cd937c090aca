"""Templates with the constructs of published ones, times histories that clients send, against Jinja's own sandbox."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.jinja_reference import reference_environment
from tests.fixtures.tokenizer_folders import write_kimi
from thalweg.errors import InvalidRequest
from thalweg.tokenizer.base import Tokenizer
from thalweg.tokenizer.load import load_tokenizer
from thalweg.tokenizer.template import ChatTemplate

FOLDER = Path(__file__).parents[1] / "fixtures" / "templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))

# What the reference is given, since Jinja has no conventions for messages.
LISTS = {"glm", "kimi_k2", "kimi_k2_thinking", "kimi_linear", "qwen3_5"}  # loop over the parts of content
TEXT_ARGUMENTS = {"deepseek_v3", "kimi_k2", "kimi_k2_thinking", "kimi_linear", "qwen3"}  # print arguments as they came
NONE = {"deepseek_v3"}  # ask whether content is none; to all others null is the empty string, as documented

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": " Über <b>Wetter</b> & mehr ",
            "parameters": {
                "type": "object",
                "properties": {
                    "ort": {"type": "string", "enum": ["Ulm", "Köln"]},
                    "tage": {"type": ["integer", "null"]},
                },
                "required": ["ort"],
            },
        },
    }
    for name in ("wetter", "uhr")
]
SYSTEM = {"role": "system", "content": "Be brief.\r\n\nAnswer in German. /no_think"}
USER = {"role": "user", "content": "Wie wird das <Wetter>?\n\n /think "}
AGAIN = {"role": "user", "content": [{"type": "text", "text": "Und"}, {"type": "text", "text": "morgen?"}]}


def call(number: int, arguments: str) -> dict[str, Any]:
    return {
        "id": f"functions.wetter:{number}",
        "type": "function",
        "function": {"name": "wetter", "arguments": arguments},
    }


def calling(*arguments: str, **more: Any) -> dict[str, Any]:
    calls = [call(i, text) for i, text in enumerate(arguments)]
    return {"role": "assistant", "content": None, "tool_calls": calls} | more


def result(number: int, text: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"functions.wetter:{number}", "content": text}


ULM = '{"ort":"Ulm", "tage": 3, "mehr": {"a": [1, null, "é"]}, "ja": true}'
HISTORIES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "system": ([SYSTEM, USER, {"role": "assistant", "content": "\nGut. "}, AGAIN], {}),
    "tools": ([SYSTEM, USER], {"tools": TOOLS}),
    "null content": ([USER, calling("{}"), result(0, "Regen")], {"tools": TOOLS}),
    "reasoning": (
        [
            USER,
            {"role": "assistant", "content": "<think>\nhm\n</think>\n\nGut."},
            AGAIN,
            {"role": "assistant", "content": "Moment.", "reasoning_content": "Erst suchen."},
        ],
        {"add_generation_prompt": False, "enable_thinking": False},
    ),
    "several calls": ([USER, calling(ULM, '{"ort": "Köln"}', reasoning_content="Beide.")], {"tools": TOOLS}),
    "tool results": (
        [
            SYSTEM,
            USER,
            calling(ULM, "{}"),
            result(0, "Regen"),
            result(1, "Sonne\n"),
            {"role": "assistant", "content": "Beides."},
            USER,
        ],
        {"tools": TOOLS},
    ),
}


def as_the_reference_takes_it(name: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    messages = copy.deepcopy(messages)
    for message in messages:
        if message["content"] is None and name not in NONE:
            message["content"] = ""
        if isinstance(message["content"], list) and name not in LISTS:
            message["content"] = "\n".join(part["text"] for part in message["content"])
        for made in message.get("tool_calls", []) if name not in TEXT_ARGUMENTS else []:
            made["function"]["arguments"] = json.loads(made["function"]["arguments"])
    return messages


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_kimi(tmp_path_factory.mktemp("kimi")))


def source(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def reference(name: str, messages: list[dict[str, Any]], **options: Any) -> str:
    variables = {"tools": None, "documents": None, "add_generation_prompt": True} | options
    variables |= {"bos_token": "[BOS]", "eos_token": "<|im_end|>"}
    template = reference_environment().from_string(source(name))
    return template.render(messages=as_the_reference_takes_it(name, messages), **variables)


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("name", NAMES)
def test_a_history_is_rendered_as_by_jinjas_own_sandbox(tokenizer: Tokenizer, name: str, history: str) -> None:
    messages, options = HISTORIES[history]
    assert ChatTemplate(source(name), tokenizer).render(messages, **options) == reference(name, messages, **options)


@pytest.mark.parametrize("name", NAMES)
def test_a_continued_turn_ends_with_its_content(tokenizer: Tokenizer, name: str) -> None:
    options = {"add_generation_prompt": False, "continue_final_message": True}
    open_end = "<open end>"
    final = {"role": "assistant", "content": "Es wird"}
    rendered = ChatTemplate(source(name), tokenizer).render([SYSTEM, USER, final], **options)
    marked = reference(name, [SYSTEM, USER, final | {"content": "Es wird" + open_end}], add_generation_prompt=False)
    assert rendered == marked.partition(open_end)[0]
    assert rendered.endswith("Es wird")


@pytest.mark.parametrize("name", NAMES)
def test_images_are_refused(tokenizer: Tokenizer, name: str) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    content = [{"type": "text", "text": "Was ist das?"}, image]
    with pytest.raises(InvalidRequest, match=r"messages\[1\]\.content\[1\] is of type 'image_url'; expected text"):
        ChatTemplate(source(name), tokenizer).render([SYSTEM, {"role": "user", "content": content}])


def test_the_families_are_there() -> None:
    assert len(NAMES) == 12
