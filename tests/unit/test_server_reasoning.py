"""Reasoning apart from the answer, and stop strings, which are about the answer, over HTTP."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.server_double import ClientDouble
from tests.unit.test_server_tools import CHAT, KIMI, TEMPLATE, added_up, ask
from thalweg.tokenizer.detokenizer import MARKS

THOUGHTS = "<think>One.\n\nTwo.</think>\n\nFirst.\n\nSecond."
CALL_AFTER = 'Look.<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a": "x.y"}<|tool_call_end|>'


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("answer", "stop", "reasoning", "content", "finish"),
    [
        (THOUGHTS, "\n\n", "One.\n\nTwo.", "First.", "stop"),
        (THOUGHTS, ["Two"], "One.\n\nTwo.", "First.\n\nSecond.", "stop"),
        (THOUGHTS, ["Sec", "First.\n\nS"], "One.\n\nTwo.", "", "stop"),
        (CALL_AFTER, ".y", None, "Look.", "tool_calls"),
        (CALL_AFTER, "k.", None, "Loo", "stop"),
        ("<think>" + CALL_AFTER + "More.</think>Done. Really.", ".", "Look.More.", "Done", "tool_calls"),
    ],
)
def test_stop_strings_are_about_the_content(
    stream: bool, answer: str, stop: Any, reasoning: str | None, content: str, finish: str
) -> None:
    client = ClientDouble(answer=answer, template=KIMI)
    got = ask(client, {**CHAT, "stop": stop, "stream": stream})
    choice = got[-1]["choices"][0] if stream else got["choices"][0]
    message = added_up(got) if stream else choice["message"]
    assert (message.get("reasoning_content"), message["content"] or "") == (reasoning, content)
    assert choice["finish_reason"] == finish
    assert ("tool_calls" in message) == (finish == "tool_calls")


def test_a_stop_string_is_shown_where_that_is_asked_for_and_ends_the_request() -> None:
    client = ClientDouble(answer=THOUGHTS, template=KIMI)
    got = ask(client, {**CHAT, "stop": "\n\n", "include_stop_str_in_output": True})
    assert got["choices"][0]["message"]["content"] == "First.\n\n"
    assert got["usage"]["completion_tokens"] == len(client.answer) - len("Second.")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("spelled", [False, True])
def test_reasoning_whose_mark_is_in_the_prompt_only(stream: bool, spelled: bool) -> None:
    template = TEMPLATE + "{% if enable_thinking is not false %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"
    client = ClientDouble(answer="first I add.</think>It is 4.", template=template)
    if spelled:  # a tokenizer that has no tokens for the marks
        client.codec.tokenizer.special_tokens.clear()
        client.answer = list(b"first I add.</think>It is 4.")
    only_begun = ClientDouble(answer="first I add.</think>It is 4.", template=TEMPLATE + "<think>\n")
    assert ask(only_begun, CHAT | {"tools": []})["choices"][0]["message"]["reasoning_content"] == "first I add."
    for more, reasoning, content in (
        ({}, "first I add.", "It is 4."),
        ({"max_tokens": 8}, "first I", ""),
        ({"chat_template_kwargs": {"enable_thinking": False}}, None, None),
    ):
        got = ask(client, {"messages": CHAT["messages"], "stream": stream, **more})
        message = added_up(got) if stream else got["choices"][0]["message"]
        assert message.get("reasoning_content") == reasoning
        if content is not None:
            assert (message["content"] or "") == content


def test_private_characters_that_a_model_spells_are_no_marks_where_it_has_no_marker_tokens() -> None:
    client = ClientDouble(template=KIMI)
    client.codec.tokenizer.special_tokens.clear()
    spelled = "".join(map(chr, MARKS[:12]))
    client.answer = list(f"<think>a{spelled}</think>b{spelled}c".encode())
    message = ask(client, CHAT)["choices"][0]["message"]
    assert message["reasoning_content"] == "a" + "\ufffd" * 12
    assert message["content"] == "b" + "\ufffd" * 12 + "c"


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_of_reasoning_are_counted_where_they_can_be_told(stream: bool) -> None:
    body = {**CHAT, "n": 2, "stream": stream} | ({"stream_options": {"include_usage": True}} if stream else {})
    got = ask(ClientDouble(answer="<think>One.</think>Two.", template=KIMI), body)
    usage = (got[-1] if stream else got)["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 2 * len("One.")}
    assert "completion_tokens_details" not in ask(ClientDouble(), {"messages": CHAT["messages"]})["usage"]


THINKS = "{{ enable_thinking }}{{ reasoning_effort }};{# <think> </think> #}"
SCHEMA = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}


@pytest.mark.parametrize(
    ("more", "prompt", "may_think"),
    [
        ({}, ";", True),
        ({"reasoning_effort": "low"}, "low;", True),
        ({"reasoning_effort": "none"}, "Falsenone;", False),
        ({"enable_thinking": False}, "False;", False),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "False;", False),
        ({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}, "Truenone;", True),
    ],
)
def test_reasoning_that_is_switched_off_has_no_place_before_a_schema(
    more: dict[str, Any], prompt: str, may_think: bool
) -> None:
    client = ClientDouble(template=THINKS)
    ask(client, {"messages": CHAT["messages"], "response_format": SCHEMA, **more})
    [request] = client.seen
    assert bytes(request.prompt_token_ids).decode() == prompt
    assert request.params.grammar is not None
    assert bool(request.params.grammar.before) == may_think


@pytest.mark.parametrize("field", ["max_thinking_tokens", "thinking_token_budget", "thinking_budget_tokens"])
def test_a_budget_reaches_the_engine_or_is_refused(field: str) -> None:
    body = {"messages": CHAT["messages"], field: 7}
    client = ClientDouble(template=THINKS)
    ask(client, body)
    limit = client.seen[0].params.thinking
    assert limit is not None
    assert (limit.max_tokens, limit.begun) == (7, False)
    error = ask(ClientDouble(), body)["error"]
    assert (error["code"], error["param"]) == ("unsupported", field)
    assert ask(ClientDouble(), {"messages": CHAT["messages"], field: -1})["choices"]


def test_a_budget_counts_from_the_prompt_if_that_begins_reasoning() -> None:
    client = ClientDouble(template="{{ messages[0].content }}<think>{# </think> #}")
    ask(client, {"messages": CHAT["messages"], "max_thinking_tokens": 7})
    limit = client.seen[0].params.thinking
    assert limit is not None
    assert limit.begun


@pytest.mark.parametrize("more", [{"enable_thinking": False}, {"reasoning_effort": "none"}])
def test_reasoning_that_is_switched_off_is_closed_where_the_template_begins_it_all_the_same(more: Any) -> None:
    client = ClientDouble(template="{{ messages[0].content }}<think>{# </think> #}")
    for body, most in ((more, 0), ({**more, "max_thinking_tokens": 3}, 3)):
        ask(client, {"messages": CHAT["messages"], **body})
        limit = client.seen[-1].params.thinking
        assert limit is not None
        assert (limit.max_tokens, limit.begun) == (most, True)
    ask(client, {"messages": CHAT["messages"]})
    assert client.seen[-1].params.thinking is None
