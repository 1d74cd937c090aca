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
