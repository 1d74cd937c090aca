"""Each Qwen version over HTTP: the prompt that its template makes, how answers are read, and what its template refuses.

The templates are ours, in the manner of the published ones.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.fixtures.qwen_templates import CHANGES, qwen_template
from tests.unit.server_double import ClientDouble, run
from tests.unit.test_server_tools import added_up, ask
from thalweg.server.parsers.formats import OutputFormat

XML = ("coder-next", "3.5", "3.5-small", "3.6", "3.8")
THINKS = ("next-thinking", "3.5", "3.6", "3.8")  # by default
LATER = ("3.5", "3.5-small", "3.6", "3.8")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
]
QUESTION = {"role": "user", "content": "Weather?"}
ARGUMENTS = '{"place": "Ulm", "wind": true, "hour": null, "days": [1, false]}'
CALLING = {
    "role": "assistant",
    "content": None,
    "reasoning_content": "Look it up.",
    "tool_calls": [{"id": "c", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}],
}
RESULTS = [{"role": "tool", "tool_call_id": "c", "content": text} for text in ("Sun", "Rain")]
ANSWERED = {"role": "assistant", "content": "Both.", "reasoning_content": "Say both."}
AGAIN = {"role": "user", "content": [{"type": "text", "text": "And tomorrow?"}]}


def prompt(version: str, messages: list[dict[str, Any]], **more: Any) -> str:
    client = ClientDouble(template=qwen_template(version))
    answer = ask(client, {"messages": messages, **more})
    assert "choices" in answer, answer
    return str(client.codec.tokenizer.decode(client.seen[0].prompt_token_ids))


@pytest.mark.parametrize("version", CHANGES)
def test_the_answers_format_is_told_by_the_template(version: str) -> None:
    form = OutputFormat.of(ClientDouble(template=qwen_template(version)).codec, "auto", "auto")
    assert form.calls is not None
    assert form.calls.name == ("qwen3_coder" if version in XML else "hermes")
    assert form.thinking == (version not in ("next-instruct", "coder-next"))


@pytest.mark.parametrize("version", CHANGES)
def test_a_generation_prompt_opens_or_closes_reasoning(version: str) -> None:
    opened, closed = "<|im_start|>assistant\n<think>\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    by_default = opened if version in THINKS else closed if version in LATER else "<|im_start|>assistant\n"
    assert prompt(version, [QUESTION]).endswith("<|im_end|>\n" + by_default)
    if version in LATER:
        assert prompt(version, [QUESTION], enable_thinking=False).endswith(closed)
        assert prompt(version, [QUESTION], chat_template_kwargs={"enable_thinking": True}).endswith(opened)


def test_a_conversation_with_tools_in_full() -> None:
    """Reasoning and calls of the turn under way are there, scalars as Python prints them, results in one user turn."""
    text = prompt("3.5", [QUESTION, CALLING, *RESULTS], tools=TOOLS)
    system, _, rest = text.partition("<|im_end|>\n")
    tools = system.partition("<tools>\n")[2].partition("\n</tools>")[0]
    assert [json.loads(line) for line in tools.splitlines()] == TOOLS
    assert rest == (
        "<|im_start|>user\nWeather?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nLook it up.\n</think>\n\n"
        "<tool_call>\n<function=weather>\n<parameter=place>\nUlm\n</parameter>\n<parameter=wind>\nTrue\n</parameter>\n"
        "<parameter=hour>\nNone\n</parameter>\n<parameter=days>\n[1, false]\n</parameter>\n</function>\n</tool_call>"
        "<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nSun\n</tool_response>\n<tool_response>\nRain\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )


@pytest.mark.parametrize("version", ["3.6", "3.8", "coder-next"])
def test_later_versions_print_scalars_as_json(version: str) -> None:
    text = prompt(version, [QUESTION, CALLING, *RESULTS], tools=TOOLS)
    assert "<parameter=wind>\ntrue\n</parameter>\n<parameter=hour>\nnull\n</parameter>" in text
    assert "<parameter=place>\nUlm\n</parameter>" in text


@pytest.mark.parametrize(
    ("version", "options", "kept"),
    [
        ("3.5", {}, False),
        ("3.6", {}, False),
        ("3.6", {"preserve_thinking": True}, True),
        ("3.8", {}, True),
        ("3.8", {"preserve_thinking": False}, False),
    ],
)
def test_reasoning_before_the_last_user_query(version: str, options: dict[str, Any], kept: bool) -> None:
    messages = [QUESTION, CALLING, *RESULTS, ANSWERED, AGAIN]
    text = prompt(version, messages, tools=TOOLS, chat_template_kwargs=options)
    assert ("Look it up." in text) == ("Say both." in text) == kept
    assert text.count("<think>") == (3 if kept else 1)
    assert text.endswith("<|im_start|>user\nAnd tomorrow?<|im_end|>\n<|im_start|>assistant\n<think>\n")


def test_reasoning_effort_reaches_the_template() -> None:
    assert prompt("3.8", [QUESTION], reasoning_effort="low").startswith("<|im_start|>system\nReasoning effort: low<")
    assert prompt("3.8", [QUESTION], reasoning_effort="xhigh").startswith("<|im_start|>user\n")


def xml(place: str, days: str) -> str:
    place, days = (f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in (("place", place), ("days", days)))
    return f"<tool_call>\n<function=weather>\n{place}{days}</function>\n</tool_call>"


HERMES = '<tool_call>\n{"name": "weather", "arguments": {"place": "07", "days": 3}}\n</tool_call>'


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("version", CHANGES)
def test_reasoning_and_calls_come_apart_from_the_content(version: str, stream: bool) -> None:
    call = xml("07", "3") if version in XML else HERMES
    thinks = version in THINKS
    answer = ("I look.\n</think>\n\n" if thinks else "") + "One moment.\n\n" + call
    client = ClientDouble(answer=answer, template=qwen_template(version))
    got = ask(client, {"messages": [QUESTION], "tools": TOOLS, "stream": stream})
    choice = got[-1]["choices"][0] if stream else got["choices"][0]
    message = added_up(got) if stream else choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message.get("reasoning_content") == ("I look." if thinks else None)
    assert message["content"].strip() == "One moment."
    [made] = message["tool_calls"]
    assert made["function"]["name"] == "weather"
    assert json.loads(made["function"]["arguments"]) == {"place": "07", "days": 3}  # by the declared types


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_within_reasoning_is_a_call(stream: bool) -> None:
    answer = "I look." + xml("Ulm", "2") + "Good.\n</think>\n\nSun."
    client = ClientDouble(answer=answer, template=qwen_template("3.5"))
    got = ask(client, {"messages": [QUESTION], "tools": TOOLS, "stream": stream})
    message = added_up(got) if stream else got["choices"][0]["message"]
    assert message["reasoning_content"] == "I look.Good."
    assert message["content"] == "Sun."
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"place": "Ulm", "days": 2}


def test_without_thinking_the_answer_is_content() -> None:
    client = ClientDouble(answer="Sun.", template=qwen_template("3.5"))
    for more in ({"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}}):
        message = ask(client, {"messages": [QUESTION], **more})["choices"][0]["message"]
        assert message["content"] == "Sun."
        assert message.get("reasoning_content") is None


@pytest.mark.parametrize("version", LATER)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_template_raises_is_a_400(version: str, stream: bool) -> None:
    client = ClientDouble(template=qwen_template(version))
    body = {"messages": [{"role": "system", "content": "Be brief."}], "stream": stream}
    status, error = refused(client, body)
    assert status == 400
    assert "No user message." in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "messages")


@pytest.mark.parametrize("version", LATER)
def test_a_later_system_message_which_the_template_refuses_is_the_users(version: str) -> None:
    brief = "Be brief."
    asked, later = (ClientDouble(template=qwen_template(version)) for _ in range(2))
    ask(asked, {"messages": [QUESTION, {"role": "system", "content": brief}]})
    ask(later, {"messages": [QUESTION, {"role": "user", "content": brief}]})
    assert asked.seen[0].prompt_token_ids == later.seen[0].prompt_token_ids


@pytest.mark.parametrize("version", CHANGES)
@pytest.mark.parametrize("kind", ["image_url", "video_url", "image"])
def test_images_are_a_400_that_names_the_part(version: str, kind: str) -> None:
    """Also where the template has words for them."""
    content = [{"type": "text", "text": "What is it?"}, {"type": kind, kind: {"url": "https://example.com/a.png"}}]
    status, error = refused(
        ClientDouble(template=qwen_template(version)), {"messages": [{"role": "user", "content": content}]}
    )
    assert status == 400
    assert f"messages[0].content[1] is of type '{kind}'; expected text" in error["message"]
    assert error["param"] == "messages"


def refused(client: ClientDouble, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    async def work(http: Any, _: ClientDouble) -> tuple[int, dict[str, Any]]:
        response = await http.post("/v1/chat/completions", json=body)
        return response.status_code, response.json()["error"]

    found: tuple[int, dict[str, Any]] = run(work, client)
    assert not client.seen
    return found
