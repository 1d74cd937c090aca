"""Chats of Kimi-K2 and K2-Thinking over HTTP: a call, its result, and the prompt that both make of the next turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.server_double import ClientDouble
from tests.unit.test_server_tools import added_up, ask

TEMPLATES = Path(__file__).parents[1] / "fixtures/templates"  # ours, in the manner of the published ones
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
DECLARED = f"<|im_system|>tool_declare<|im_middle|>{json.dumps(TOOLS, separators=(',', ':'))}<|im_end|>"
QUESTION = {"role": "user", "content": "Weather?"}
CALLS = (
    "<|tool_calls_section_begin|>"
    '<|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{"place": "Ulm"}<|tool_call_end|>'
    '<|tool_call_begin|>functions.weather:1<|tool_call_argument_begin|>{"place": "Bonn"}<|tool_call_end|>'
    "<|tool_calls_section_end|>"
)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["kimi_k2", "kimi_k2_thinking"])
def test_calls_and_reasoning_come_back_as_the_next_prompt(name: str, stream: bool) -> None:
    template, thinks = (TEMPLATES / f"{name}.jinja").read_text(), name == "kimi_k2_thinking"
    answer = ("<think>Two places.</think>" if thinks else "") + "I look." + CALLS
    client = ClientDouble(answer=answer, template=template)

    def prompt() -> str:
        return str(client.codec.tokenizer.decode(client.seen[-1].prompt_token_ids))

    body: dict[str, Any] = {"messages": [QUESTION], "tools": TOOLS, "stream": stream}
    got = ask(client, body)
    system = "" if thinks else "<|im_system|>system<|im_middle|>You help, briefly.<|im_end|>"
    asked = f"{DECLARED}{system}<|im_user|>user<|im_middle|>Weather?<|im_end|>"
    assert prompt() == f"{asked}<|im_assistant|>assistant<|im_middle|>"
    message = added_up(got) if stream else got["choices"][0]["message"]
    assert message["content"] == "I look."
    assert message.get("reasoning_content") == ("Two places." if thinks else None)
    calls = message["tool_calls"]
    assert [call["id"] for call in calls] == ["functions.weather:0", "functions.weather:1"]
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"place": "Ulm"}, {"place": "Bonn"}]

    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": text}
        for call, text in zip(calls, ("Sun", "Rain"), strict=True)
    ]
    ask(client, {**body, "messages": [QUESTION, message, *results]})
    returned = "".join(
        f"<|im_system|>tool<|im_middle|>## Return of functions.weather:{i}\n{text}<|im_end|>"
        for i, text in enumerate(("Sun", "Rain"))
    )
    turn = f"<|im_assistant|>assistant<|im_middle|>{answer}<|im_end|>"
    assert prompt() == f"{asked}{turn}{returned}<|im_assistant|>assistant<|im_middle|>"
