"""Anthropic's Messages API: shapes, events, tools, thinking, errors. The engine is a double."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fixtures.qwen_templates import qwen_template
from tests.unit.server_double import ANSWER, ClientDouble, run, serving
from thalweg.core import SamplingParams
from thalweg.server.anthropic.answer import MessageAnswer
from thalweg.server.conversation import Conversation
from thalweg.server.parsers.formats import OutputFormat
from thalweg.server.settings import ServerSettings
from thalweg.server.tools import ToolUse
from thalweg.text.output import Delta

HI = {"max_tokens": 400, "messages": [{"role": "user", "content": "hi"}]}
TEMPLATE = (
    "{{ tools }}{{ enable_thinking }}{{ reasoning_effort }}{% for m in messages %}[{{ m.role }}:{{ m.content }}"
    "{{ m.reasoning_content }}{% for c in m.tool_calls %}{{ c.id }}={{ c.function.name }}{{ c.function.arguments }}"
    "{% endfor %}{{ m.tool_call_id }}]{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    "{# <think> </think> <tool_call> #}"
)
TOOLS = [
    {"name": "weather", "description": "of a city", "input_schema": {"type": "object", "properties": {"city": {}}}},
    {"name": "time", "input_schema": {"type": "object"}, "type": "custom"},
]
CALLS = (
    '<think>hm, two</think>I look.<tool_call>{"name": "weather", "arguments": {"city": "Örebro"}}</tool_call>'
    '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
)


def post(body: dict[str, Any], client: ClientDouble | None = None, path: str = "/v1/messages") -> Any:
    async def work(http: Any, _: ClientDouble) -> Any:
        return await http.post(path, json=body)

    return run(work, client)


def prompt_of(body: dict[str, Any]) -> str:
    client = ClientDouble(template=TEMPLATE)
    response = post({**HI, **body}, client)
    assert response.status_code == 200, response.text
    return bytes(i for i in client.seen[0].prompt_token_ids if i < 256).decode()


def folded(text: str) -> dict[str, Any]:
    """The message that a stream adds up to, by Anthropic's rules."""
    message: dict[str, Any] = {}
    for event in text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        value = json.loads(data.removeprefix("data: "))
        kind = value["type"]
        assert name == f"event: {kind}"
        if kind == "message_start":
            message = value["message"]
            assert (message["content"], message["stop_reason"]) == ([], None)
        elif kind == "content_block_start":
            assert value["index"] == len(message["content"])
            message["content"].append(value["content_block"] | {"json": ""})
        elif kind == "content_block_delta":
            block, delta = message["content"][value["index"]], value["delta"]
            field = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature"}
            if delta["type"] == "input_json_delta":
                block["json"] += delta["partial_json"]
            else:
                block[field[delta["type"]]] += delta[field[delta["type"]]]
        elif kind == "content_block_stop":
            assert value["index"] == len(message["content"]) - 1
            block = message["content"][-1]
            if written := block.pop("json"):
                block["input"] = json.loads(written)
        elif kind == "message_delta":
            message |= value["delta"] | {"usage": value["usage"]}
        else:
            assert kind == "message_stop"
    return message


def test_an_answer_has_anthropics_shape_and_counts_right() -> None:
    answer = post(HI, ClientDouble(cached=3)).json()
    prompt = len(b"user:hi\nassistant:")
    assert answer.pop("id").startswith("msg")
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": "double",
        "content": [{"type": "text", "text": ANSWER}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": prompt - 3,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 3,
            "output_tokens": len(ANSWER.encode()) + 1,
            "output_tokens_details": {"thinking_tokens": 0},
        },
    }


@pytest.mark.parametrize(
    ("answer", "more", "reason"),
    [
        (ANSWER, {}, "end_turn"),
        (ANSWER, {"max_tokens": 3}, "max_tokens"),
        (ANSWER, {"max_tokens": 1}, "max_tokens"),
        (ANSWER, {"stop_sequences": [", w"]}, "stop_sequence"),
        (CALLS, {"tools": TOOLS}, "tool_use"),
        (CALLS, {"tools": TOOLS, "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, "tool_use"),
        (CALLS, {"tools": TOOLS, "thinking": {"type": "adaptive", "display": "omitted"}}, "tool_use"),
        ("<think>so", {}, "end_turn"),
        ("", {}, "end_turn"),
    ],
)
def test_a_stream_adds_up_to_the_whole(answer: str, more: dict[str, Any], reason: str) -> None:
    whole = post({**HI, **more}, ClientDouble(answer=answer, template=TEMPLATE)).json()
    streamed = folded(post({**HI, **more, "stream": True}, ClientDouble(answer=answer, template=TEMPLATE)).text)
    assert whole["stop_reason"] == reason
    for message in (whole, streamed):
        for named in (message, *message["content"]):
            named.pop("id", None)
    assert whole == streamed


def test_blocks_of_thinking_text_and_calls() -> None:
    answer = post({**HI, "tools": TOOLS}, ClientDouble(answer=CALLS, template=TEMPLATE)).json()
    thinking, text, weather, time = answer["content"]
    assert thinking == {"type": "thinking", "thinking": "hm, two", "signature": "unsigned"}
    assert text == {"type": "text", "text": "I look."}
    assert (weather["name"], weather["input"]) == ("weather", {"city": "Örebro"})
    assert (time["type"], time["name"], time["input"]) == ("tool_use", "time", {})
    assert weather["id"] != time["id"]
    assert answer["usage"]["output_tokens_details"] == {"thinking_tokens": len("hm, two")}


def test_thinking_may_be_left_out() -> None:
    body = {**HI, "tools": TOOLS, "thinking": {"type": "adaptive", "display": "omitted"}}
    answer = post(body, ClientDouble(answer=CALLS, template=TEMPLATE)).json()
    assert answer["content"][0] == {"type": "thinking", "thinking": "", "signature": "unsigned"}
    assert answer["content"][1] == {"type": "text", "text": "I look."}


def test_a_stop_sequence_is_named() -> None:
    answer = post({**HI, "stop_sequences": ["zzz", ", w"]}).json()
    assert (answer["content"], answer["stop_sequence"]) == ([{"type": "text", "text": "Hello"}], ", w")


@pytest.mark.parametrize("answer", ["", ANSWER])
def test_a_stream_begins_without_a_stop_reason_even_if_it_ends_at_once(answer: str) -> None:
    async def news() -> Any:
        yield 0, Delta("m", answer, [72], "stop", ", w")

    service: Any = SimpleNamespace(names=["m"], output=OutputFormat(None, False, None))
    talk = Conversation("msg_1", [1, 2, 3], SamplingParams(max_tokens=9), ToolUse([]), news(), asyncio.Event())

    async def events() -> list[Any]:
        return [event async for event in MessageAnswer(service, talk, False).events()]

    first, *_, delta, _ = asyncio.run(events())
    assert (first["message"]["stop_reason"], first["message"]["stop_sequence"]) == (None, None)
    assert delta["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": ", w"}


def test_later_system_messages_reach_templates_that_take_one_at_the_beginning() -> None:
    client = ClientDouble(template=qwen_template("3.8"))
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "B"}]},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "system", "content": "C"},
        {"role": "user", "content": "three"},
    ]
    response = post({"max_tokens": 9, "system": "A", "messages": messages}, client)
    assert response.status_code == 200, response.text
    prompt = bytes(i for i in client.seen[0].prompt_token_ids if i < 256).decode()
    assert "<|im_start|>system\nA\n\nB<|im_end|>\n<|im_start|>user\none<|im_end|>" in prompt
    assert "<|im_start|>user\nC<|im_end|>\n<|im_start|>user\nthree<|im_end|>" in prompt


def test_a_conversation_is_laid_out_by_the_template() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "T", "signature": "unsigned"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "b"},
                {"type": "text", "text": "c"},
                {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "X"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sunny"}]},
                {"type": "tool_result", "tool_use_id": "t2", "is_error": True},
                {"type": "text", "text": "and?"},
            ],
        },
    ]
    got = prompt_of({"system": [{"type": "text", "text": "S"}], "messages": messages})
    assert got.endswith(
        '[system:S][user:a][assistant:bcTt1=weather{"city": "X"}][tool:sunnyt1][tool:t2][user:and?]assistant:'
    )


def test_a_document_of_text_is_text() -> None:
    source = {"type": "text", "media_type": "text/plain", "data": "Grass is green."}
    blocks = [
        {"type": "document", "source": source, "title": "Facts", "context": "of a garden", "citations": None},
        {"type": "text", "text": "So?"},
    ]
    assert "[user:Facts\nof a garden\nGrass is green.\nSo?]" in prompt_of(
        {"messages": [{"role": "user", "content": blocks}]}
    )


def test_an_answer_that_is_begun_is_gone_on_with() -> None:
    client = ClientDouble()
    post({**HI, "messages": [*HI["messages"], {"role": "assistant", "content": "I am"}]}, client)  # type: ignore[misc]
    assert bytes(client.seen[0].prompt_token_ids) == b"user:hi\nassistant:I am\n"


@pytest.mark.parametrize(
    ("more", "variable", "budget"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "True", 1024),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, "Truelow", None),
        ({"thinking": {"type": "disabled"}}, "False", None),
        ({"max_thinking_tokens": 7}, "", 7),
        ({}, "", None),
    ],
)
def test_thinking(more: dict[str, Any], variable: str, budget: int | None) -> None:
    client = ClientDouble(template="{{ enable_thinking }}{{ reasoning_effort }};{# <think> </think> #}")
    assert post({**HI, **more}, client).status_code == 200
    [request] = client.seen
    assert bytes(request.prompt_token_ids).decode() == f"{variable};"
    assert (request.params.thinking and request.params.thinking.max_tokens) == budget


def test_parameters_reach_the_engine() -> None:
    client = ClientDouble()
    body = {**HI, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "stop_sequences": ["x"], "seed": 3, "cache_salt": "s"}
    assert post(body, client).status_code == 200
    p = client.seen[0].params
    assert (p.max_tokens, p.temperature, p.top_p, p.top_k, p.stop, p.seed, p.cache_salt) == (
        400,
        0.5,
        0.9,
        4,
        ("x",),
        3,
        "s",
    )


def test_a_tool_that_must_be_called_and_a_schema_hold_the_output_to_it() -> None:
    schema = {"type": "json_schema", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    for more, said in (
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "time"}}, "time"),
        ({"tools": TOOLS, "tool_choice": {"type": "any"}}, "weather"),
        ({"output_config": {"format": schema}}, '"integer"'),
        ({"output_format": schema}, '"integer"'),
    ):
        client = ClientDouble(template=TEMPLATE)
        assert post({**HI, **more}, client).status_code == 200
        grammar = client.seen[0].params.grammar
        assert grammar is not None
        assert said in grammar.text


def test_tokens_are_counted_as_an_answer_would_have_them() -> None:
    body = {**HI, "tools": TOOLS, "system": "S"}
    counted = post(
        {k: v for k, v in body.items() if k != "max_tokens"},
        ClientDouble(template=TEMPLATE),
        "/v1/messages/count_tokens",
    )
    assert counted.json() == {
        "input_tokens": post(body, ClientDouble(template=TEMPLATE)).json()["usage"]["input_tokens"]
    }


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"max_tokens": None}, "max_tokens is null; expected an integer"),
        ({"messages": []}, "messages has 0 items; expected at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 'messages[0].role is "tool"; expected user, assistant'),
        ({"messages": [{"role": "user"}]}, "messages[0].content is a NoneType; expected a string or a list"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0] is a str; expected a block"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            'messages[0].content[0] is of type "image"; expected text',
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": 3}]}
                ]
            },
            "messages[0].content[0].input is a int; expected an object",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
            "messages[0].content[0].tool_use_id is",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "base64"}}]}]},
            'messages[0].content[0].source is of type "base64"; expected text',
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "document", "citations": {"enabled": True}, "source": None}]}
                ]
            },
            'messages[0].content[0].citations is {"enabled": true}; expected it left out',
        ),
        ({"system": 5}, "system is 5; expected a string or a list of text blocks"),
        ({"system": [{"type": "image"}]}, 'system[0] is of type "image"; expected text'),
        ({"temperature": -1}, "temperature is -1.0; expected"),
        ({"stop_sequences": ["x" * 2000]}, "stop_sequences is ("),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "thinking.budget_tokens is -1; expected a number"),
        ({"thinking": {"type": "x"}}, "thinking.type is \"x\"; expected 'enabled', 'adaptive'"),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            'tools[0] is of type "web_search_20250305"',
        ),
        ({"tools": [{"name": "a b"}]}, 'tools[0].name is "a b"; expected'),
        ({"tools": [{"name": "a", "input_schema": 4}]}, "tools[0].input_schema is a int; expected a JSON schema"),
        (
            {"tools": [{"name": "a].function.parameters"}]},
            'tools[0].name is "a].function.parameters"; expected 1 to 64',
        ),
        (
            {"tools": TOOLS, "tool_choice": {"type": "tool", "name": "x"}},
            'tool_choice is the tool "x"; expected a tool',
        ),
        ({"output_config": {"format": {"type": "x"}}}, "output_config.format is "),
        ({"mcp_servers": [{"url": "http://x"}]}, "mcp_servers is "),
        ({"messages": [{"role": "user", "content": "REFUSE"}]}, "prompt is too long: the prompt has 9 tokens"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs has 'messages'"),
    ],
)
def test_bad_fields_name_themselves_in_anthropics_shape(more: dict[str, Any], message: str) -> None:
    client = ClientDouble(template=TEMPLATE)
    response = post({**HI, **more}, client)
    assert response.status_code == 400, response.text
    error = response.json()
    assert error["type"] == "error"
    assert error["error"]["type"] == "invalid_request_error"
    assert error["error"]["message"].startswith(message), error


def test_a_budget_needs_marks_that_are_tokens_unless_the_model_does_not_reason() -> None:
    thinking = {**HI, "thinking": {"type": "enabled", "budget_tokens": 9}}

    async def work() -> None:
        async with serving(ClientDouble(), ServerSettings(reasoning_parser="think")) as http:
            error = (await http.post("/v1/messages", json=thinking)).json()["error"]
            assert error["message"] == "thinking is 9, which is not supported; expected it left out"

    asyncio.run(work())
    client = ClientDouble()
    assert post(thinking, client).status_code == 200
    assert client.seen[0].params.thinking is None
    error = post({**HI, "max_thinking_tokens": 9}).json()["error"]
    assert error["message"] == "max_thinking_tokens is 9, which is not supported; expected it left out or -1"


def test_models_and_request_ids_are_as_anthropics_clients_read_them() -> None:
    async def work(http: Any, _: ClientDouble) -> None:
        models = (await http.get("/v1/models")).json()
        [model] = models["data"]
        assert (models["has_more"], models["first_id"], models["last_id"]) == (False, "double", "double")
        assert (model["type"], model["display_name"], model["max_input_tokens"]) == ("model", "double", 1000)
        assert datetime.fromisoformat(model["created_at"]).timestamp() == model["created"]
        for headers in ({}, {"x-request-id": "mine"}):
            response = await http.post("/v1/messages", json=HI, headers=headers)
            assert response.headers["request-id"] == response.headers["x-request-id"]
        assert response.headers["request-id"] == "mine"

    run(work)


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        (b"{", 400, "invalid_request_error"),
        (b'{"max_tokens":1,"messages":' + b"[" * 5000 + b"]" * 5000 + b"}", 400, "invalid_request_error"),
        (b'{"max_tokens":1e999,"messages":[]}', 400, "invalid_request_error"),
        (json.dumps({**HI, "model": "other"}).encode(), 404, "not_found_error"),
    ],
)
def test_hostile_bodies_get_an_error_and_harm_no_other(body: bytes, status: int, kind: str) -> None:
    async def work(http: Any, _: ClientDouble) -> None:
        response = await http.post("/v1/messages", content=body, headers={"content-type": "application/json"})
        assert (response.status_code, response.json()["error"]["type"]) == (status, kind), response.text
        assert (await http.post("/v1/messages", json=HI)).json()["content"][0]["text"] == ANSWER

    run(work)


def test_deep_tool_input_is_refused() -> None:
    deep: Any = {}
    for _ in range(200):
        deep = {"a": deep}
    block = {"type": "tool_use", "id": "a", "name": "b", "input": deep}
    response = post({**HI, "messages": [{"role": "assistant", "content": [block]}]})
    assert (response.status_code, "deep" in response.text) == (400, True), response.text


@pytest.mark.parametrize(("word", "kind"), [("FAIL", "api_error"), ("DIE", "overloaded_error")])
def test_a_stream_that_breaks_off_ends_with_an_error_event(word: str, kind: str) -> None:
    text = post({**HI, "messages": [{"role": "user", "content": word}], "stream": True}).text
    name, data = text.removesuffix("\n\n").split("\n\n")[-1].split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["type"] == kind


def test_a_key_may_come_as_x_api_key() -> None:
    async def work() -> None:
        async with serving(ClientDouble(), ServerSettings(api_keys=("one", "two"))) as http:
            for headers in ({"x-api-key": "two"}, {"Authorization": "Bearer one"}, {"x-api-key": "one"}):
                assert (await http.post("/v1/messages", json=HI, headers=headers)).status_code == 200
                assert (await http.get("/v1/models", headers=headers)).status_code == 200
            for headers in ({}, {"x-api-key": "three"}, {"x-api-key": ""}, {"Authorization": "Bearer "}):
                refused = await http.post("/v1/messages", json=HI, headers=headers)
                assert refused.status_code == 401
                assert refused.json()["error"]["type"] == "authentication_error"

    asyncio.run(work())


def test_an_answer_that_fills_the_context_says_so() -> None:
    async def news() -> Any:
        yield 0, Delta("m", "hi", [1, 2], "length")

    service: Any = SimpleNamespace(names=("m",), output=OutputFormat(None, False, None))
    for most, reason in ((2, "max_tokens"), (3, "model_context_window_exceeded")):
        talk = Conversation("m", [1], SamplingParams(max_tokens=most), ToolUse([]), news(), asyncio.Event())
        assert asyncio.run(MessageAnswer(service, talk, omit=False).whole())["stop_reason"] == reason
