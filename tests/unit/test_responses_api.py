"""OpenAI's Responses API: shapes, events, items, what is kept of answers, errors. The engine is a double."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest

from tests.fixtures.qwen_templates import qwen_template
from tests.unit.server_double import ANSWER, ClientDouble, run, serving
from tests.unit.test_anthropic_api import CALLS, TEMPLATE
from thalweg.server.responses_api.store import ResponseStore
from thalweg.server.settings import LONG_TEXT, ServerSettings, StoreLimits

HI = {"input": "hi"}
TOOLS = [
    {
        "type": "function",
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {}}},
        "strict": None,
    },
    {"type": "function", "name": "time", "description": "now", "parameters": {"type": "object"}},
]

NAMED_X = {"type": "function", "name": "x"}


def post(body: dict[str, Any], client: ClientDouble | None = None) -> Any:
    async def work(http: Any, _: ClientDouble) -> Any:
        return await http.post("/v1/responses", json=body)

    return run(work, client)


def prompt_of(client: ClientDouble, i: int = -1) -> str:
    return bytes(i for i in client.seen[i].prompt_token_ids if i < 256).decode()


def events_of(text: str) -> list[dict[str, Any]]:
    events = []
    for each in text.removesuffix("\n\n").split("\n\n"):
        name, data = each.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [e["sequence_number"] for e in events] == [*range(len(events))]
    return events


def folded(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output that the deltas add up to; every event that repeats some of it says the same."""
    output: list[dict[str, Any]] = []
    for e in events:
        kind = e["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert e["output_index"] == len(output)
            output.append(json.loads(json.dumps(e["item"])))
        if "item_id" in e:
            item = output[e["output_index"]]
            assert item["id"] == e["item_id"]
        if kind == "content_part.added":
            item["content"].append(dict(e["part"]))
        elif kind.endswith("text.delta"):
            part = item["content"][e["content_index"]]
            part["text"] += e["delta"]
            part.get("logprobs", []).extend(e.get("logprobs", []))
        elif kind.endswith("text.done"):
            assert item["content"][e["content_index"]]["text"] == e["text"]
        elif kind == "content_part.done":
            assert item["content"][e["content_index"]] == e["part"]
        elif kind == "function_call_arguments.delta":
            item["arguments"] += e["delta"]
        elif kind == "function_call_arguments.done":
            assert item["arguments"] == e["arguments"]
        elif kind == "output_item.done":
            output[e["output_index"]]["status"] = e["item"]["status"]
            assert output[e["output_index"]] == e["item"]
    return output


def without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_ids(v) for k, v in value.items() if k not in ("id", "call_id", "created_at", "item_id")}
    return [without_ids(v) for v in value] if isinstance(value, list) else value


def test_an_answer_has_openais_shape_and_counts_right() -> None:
    answer = post({**HI, "metadata": {"a": "b"}, "temperature": 0.5, "user": "u"}, ClientDouble(cached=3)).json()
    prompt, output = len(b"user:hi\nassistant:"), len(ANSWER.encode()) + 1
    assert answer["id"].startswith("resp_")
    assert (answer["object"], answer["status"], answer["model"], answer["store"]) == (
        "response",
        "completed",
        "double",
        True,
    )
    assert (answer["metadata"], answer["temperature"], answer["user"]) == ({"a": "b"}, 0.5, "u")
    [message] = answer["output"]
    assert (message["type"], message["role"], message["status"]) == ("message", "assistant", "completed")
    assert message["content"] == [{"type": "output_text", "text": ANSWER, "annotations": [], "logprobs": []}]
    assert answer["usage"] == {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": output,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + output,
    }


@pytest.mark.parametrize(
    ("answer", "more", "kinds"),
    [
        (ANSWER, {}, ["message"]),
        (ANSWER, {"max_output_tokens": 1}, ["message"]),
        (ANSWER, {"include": ["message.output_text.logprobs"], "top_logprobs": 2}, ["message"]),
        (CALLS, {"tools": TOOLS}, ["reasoning", "message", "function_call", "function_call"]),
        (CALLS, {"tools": TOOLS, "parallel_tool_calls": False}, ["reasoning", "message", "function_call"]),
        (CALLS, {"tools": TOOLS, "max_output_tokens": 60}, ["reasoning", "message", "function_call"]),
        ("<think>so", {}, ["reasoning"]),
        ("", {}, []),
    ],
)
def test_a_stream_adds_up_to_the_whole(answer: str, more: dict[str, Any], kinds: list[str]) -> None:
    whole = post({**HI, **more}, ClientDouble(answer=answer, template=TEMPLATE)).json()
    events = events_of(post({**HI, **more, "stream": True}, ClientDouble(answer=answer, template=TEMPLATE)).text)
    assert [item["type"] for item in whole["output"]] == kinds
    assert [e["type"] for e in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0]["response"]["status"] == "in_progress"
    assert events[-1]["type"] == f"response.{whole['status']}"
    assert folded(events) == events[-1]["response"]["output"]
    assert without_ids(events[-1]["response"]) == without_ids(whole)


def test_an_answer_that_was_cut_off_says_so() -> None:
    answer = post({**HI, "max_output_tokens": 3}).json()
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert answer["output"][0]["status"] == "incomplete"


def test_items_of_reasoning_text_and_calls() -> None:
    answer = post({**HI, "tools": TOOLS}, ClientDouble(answer=CALLS, template=TEMPLATE)).json()
    reasoning, message, weather, time = answer["output"]
    assert (reasoning["summary"], reasoning["content"]) == ([], [{"type": "reasoning_text", "text": "hm, two"}])
    assert message["content"][0]["text"] == "I look."
    assert (weather["name"], json.loads(weather["arguments"]), weather["status"]) == (
        "weather",
        {"city": "Örebro"},
        "completed",
    )
    assert (time["name"], time["arguments"]) == ("time", "{}")
    assert answer["usage"]["output_tokens_details"] == {"reasoning_tokens": len("hm, two")}


def test_log_probabilities_of_the_text() -> None:
    body = {**HI, "include": ["message.output_text.logprobs"], "top_logprobs": 1}
    logprobs = post(body).json()["output"][0]["content"][0]["logprobs"]
    assert "".join(e["token"] for e in logprobs[:5]) == "Hello"
    assert all(len(e["top_logprobs"]) == 1 for e in logprobs)


def test_a_conversation_is_laid_out_by_the_template() -> None:
    items = [
        {"role": "developer", "content": "D"},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "T"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b", "annotations": []}]},
        {"type": "function_call", "call_id": "t1", "name": "weather", "arguments": '{"city": "X"}'},
        {"type": "function_call_output", "call_id": "t1", "output": "sunny"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "U"}]},
        {"type": "function_call", "call_id": "t2", "name": "time", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "t2", "output": [{"type": "input_text", "text": "noon"}]},
        {"type": "message", "role": "assistant", "content": "c"},
        {"role": "user", "content": "and?"},
    ]
    client = ClientDouble(template=TEMPLATE)
    assert post({"instructions": "S", "input": items}, client).status_code == 200
    assert prompt_of(client).endswith(
        '[system:S][system:D][user:a][assistant:bTt1=weather{"city": "X"}][tool:sunnyt1][assistant:Ut2=time{}]'
        "[tool:noont2][assistant:c][user:and?]assistant:"
    )


def test_instructions_and_later_system_messages_reach_templates_that_take_one_system_message() -> None:
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "B"}, {"type": "input_text", "text": "C"}]},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "system", "content": "D"},
        {"role": "user", "content": "three"},
    ]
    client = ClientDouble(template=qwen_template("3.5"))

    async def work(http: Any, _: ClientDouble) -> None:
        first = await http.post("/v1/responses", json={"instructions": "A", "input": items})
        assert first.status_code == 200, first.text
        more = {"instructions": "E", "input": "four", "previous_response_id": first.json()["id"]}
        assert (await http.post("/v1/responses", json=more)).status_code == 200

    run(work, client)
    turns = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n<|im_start|>user\nD<|im_end|>\n"
    assert prompt_of(client, 0).startswith(f"<|im_start|>system\nA\n\nB\nC<|im_end|>\n{turns}<|im_start|>user\nthree")
    assert prompt_of(client, 1).startswith(f"<|im_start|>system\nE\n\nB\nC<|im_end|>\n{turns}")


def test_parameters_reach_the_engine() -> None:
    client = ClientDouble(template=TEMPLATE)
    more = {"temperature": 0.5, "top_p": 0.9, "top_k": 4, "stop": "x", "seed": 3, "cache_salt": "s", "min_p": 0.1}
    body = {**HI, **more, "max_output_tokens": 9, "max_thinking_tokens": 5, "reasoning": {"effort": "low"}}
    assert post(body, client).status_code == 200
    p = client.seen[0].params
    assert (p.max_tokens, p.temperature, p.top_p, p.top_k, p.stop, p.seed) == (9, 0.5, 0.9, 4, ("x",), 3)
    assert (p.cache_salt, p.min_p) == ("s", 0.1)
    assert p.thinking is not None
    assert p.thinking.max_tokens == 5
    assert "low" in prompt_of(client)


def test_a_schema_and_a_required_call_hold_the_output_to_them() -> None:
    schema = {
        "type": "json_schema",
        "name": "n",
        "schema": {"type": "object", "properties": {"a": {"type": "integer"}}},
    }
    for more, said in (
        ({"text": {"format": schema}}, '"integer"'),
        ({"text": {"format": {"type": "json_object"}}}, '"object"'),
        ({"tools": TOOLS, "tool_choice": "required"}, "weather"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "time"}}, "time"),
    ):
        client = ClientDouble(template=TEMPLATE)
        assert post({**HI, **more}, client).status_code == 200
        grammar = client.seen[0].params.grammar
        assert grammar is not None
        assert said in grammar.text


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_allowed_tools_are_all_that_the_model_is_told_of(mode: str) -> None:
    client = ClientDouble(answer=CALLS, template=TEMPLATE)
    choice = {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": "time"}]}
    answer = post({**HI, "tools": TOOLS, "tool_choice": choice}, client)
    assert answer.status_code == 200, answer.text
    assert "time" in prompt_of(client)
    assert "weather" not in prompt_of(client)
    grammar = client.seen[0].params.grammar
    assert (grammar is not None, grammar is not None and "weather" in grammar.text) == (mode == "required", False)
    assert answer.json()["tool_choice"] == choice
    assert len(answer.json()["tools"]) == 2


def test_an_answer_that_is_kept_can_be_gone_on_from_read_and_deleted() -> None:
    async def work(http: Any, client: ClientDouble) -> None:
        first = (await http.post("/v1/responses", json={"input": "one", "instructions": "I"})).json()
        streamed = await http.post(
            "/v1/responses", json={"input": "two", "previous_response_id": first["id"], "stream": True}
        )
        second = events_of(streamed.text)[-1]["response"]
        assert second["previous_response_id"] == first["id"]
        third = await http.post(
            "/v1/responses", json={"input": "three", "previous_response_id": second["id"], "store": False}
        )
        assert prompt_of(client) == (
            f"user:one\nassistant:{ANSWER}\nuser:two\nassistant:{ANSWER}\nuser:three\nassistant:"
        )
        assert third.json()["store"] is False
        assert (await http.get(f"/v1/responses/{second['id']}")).json() == second
        as_stream = await http.get(f"/v1/responses/{second['id']}?stream=true")
        assert (as_stream.status_code, as_stream.json()["error"]["param"]) == (400, "stream")
        assert (await http.get(f"/v1/responses/{third.json()['id']}")).status_code == 404
        deleted = await http.delete(f"/v1/responses/{second['id']}")
        assert deleted.json() == {"id": second["id"], "object": "response", "deleted": True}
        assert (await http.delete(f"/v1/responses/{second['id']}")).status_code == 404
        gone = await http.post("/v1/responses", json={"input": "x", "previous_response_id": second["id"]})
        assert (gone.status_code, gone.json()["error"]["param"]) == (404, "previous_response_id")
        assert (await http.get(f"/v1/responses/{first['id']}")).status_code == 200

    run(work)


def test_calls_and_results_go_on_from_an_answer_that_is_kept() -> None:
    async def work(http: Any, client: ClientDouble) -> None:
        first = (await http.post("/v1/responses", json={"input": "x", "tools": TOOLS})).json()
        call = next(item for item in first["output"] if item["type"] == "function_call")
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}
        body = {"input": [result], "previous_response_id": first["id"], "tools": TOOLS}
        assert (await http.post("/v1/responses", json=body)).status_code == 200
        assert f"[assistant:I look.hm, two{call['call_id']}=weather" in prompt_of(client)
        assert prompt_of(client).endswith(f"[tool:sunny{call['call_id']}]assistant:")

    run(work, ClientDouble(answer=CALLS, template=TEMPLATE))


def test_an_answer_belongs_to_the_key_that_asked_for_it() -> None:
    async def work() -> None:
        async with serving(ClientDouble(), ServerSettings(api_keys=("one", "two"))) as http:
            one, two = {"Authorization": "Bearer one"}, {"x-api-key": "two"}
            made = (await http.post("/v1/responses", json=HI, headers=one)).json()
            path, goes_on = f"/v1/responses/{made['id']}", {**HI, "previous_response_id": made["id"]}
            for refused in (
                await http.get(path, headers=two),
                await http.delete(path, headers=two),
                await http.post("/v1/responses", json=goes_on, headers=two),
            ):
                assert (refused.status_code, refused.json()["error"]["code"]) == (404, "response_not_found")
            assert (await http.get(path, headers={"x-api-key": "one"})).json() == made
            assert (await http.post("/v1/responses", json=goes_on, headers=one)).status_code == 200

    asyncio.run(work())


def test_a_long_conversation_that_is_gone_on_from_is_encoded_off_the_event_loop() -> None:
    client = ClientDouble()
    on_loop: list[bool] = []
    encode = client.codec.chat_ids

    def chat_ids(*args: Any, **options: Any) -> list[int]:
        on_loop.append(threading.current_thread() is threading.main_thread())
        return encode(*args, **options)[-100:]

    client.codec.chat_ids = chat_ids

    async def work(http: Any, _: ClientDouble) -> None:
        short = (await http.post("/v1/responses", json=HI)).json()["id"]
        long = (await http.post("/v1/responses", json={"input": "x" * LONG_TEXT})).json()["id"]
        for path in ("/v1/responses", "/v1/responses/input_tokens"):
            for earlier in (short, long):
                await http.post(path, json={**HI, "previous_response_id": earlier})

    run(work, client)
    assert on_loop == [True, False, True, False, True, False]


def test_an_answer_too_large_to_be_kept_says_that_it_is_not() -> None:
    async def work() -> None:
        async with serving(ClientDouble(), ServerSettings(stored=StoreLimits(bytes=2000))) as http:
            assert (await http.post("/v1/responses", json=HI)).json()["store"] is True
            large = (
                await http.post("/v1/responses", json={**HI, "metadata": {"a": "b" * 500}, "user": "c" * 1500})
            ).json()
            assert large["store"] is False
            gone = (await http.get(f"/v1/responses/{large['id']}")).json()["error"]["message"]
            assert "--stored-responses-memory" in gone

    asyncio.run(work())


def test_a_server_may_keep_nothing() -> None:
    async def work() -> None:
        async with serving(ClientDouble(), ServerSettings(stored=StoreLimits(count=0))) as http:
            made = (await http.post("/v1/responses", json={**HI, "store": True})).json()
            assert made["store"] is False
            assert (await http.get(f"/v1/responses/{made['id']}")).status_code == 404

    asyncio.run(work())


def test_the_store_is_bounded_in_number_bytes_and_time() -> None:
    time = 0.0
    store = ResponseStore(StoreLimits(count=3, bytes=100, seconds=10), clock=lambda: time)
    for i in range(5):
        store.put(str(i), b"", b"x", b"y")
    assert [i for i in range(5) if store.get(str(i), b"")] == [2, 3, 4]
    store.put("large", b"", b"x" * 50, b"y" * 47)
    assert (len(store), store.bytes) == (2, 99)
    store.put("too large", b"", b"x" * 101, b"")
    assert store.get("too large", b"") is None
    assert store.get("large", b"") is not None
    time = 10.0
    assert store.get("large", b"") is None
    assert (len(store), store.bytes) == (0, 0)


@pytest.mark.parametrize("word", ["FAIL", "DIE", "EXPIRED"])
def test_a_stream_that_breaks_off_says_so_and_is_not_kept(word: str) -> None:
    async def work(http: Any, _: ClientDouble) -> None:
        events = events_of((await http.post("/v1/responses", json={"input": word, "stream": True})).text)
        kinds = [e["type"] for e in events]
        assert kinds[:2] == ["response.created", "response.in_progress"]
        assert [e["response"]["status"] for e in events[:2]] == ["in_progress", "in_progress"]
        assert kinds[-1] == "response.failed"
        assert (word == "EXPIRED") == (len(events) == 3)
        failed = events[-1]["response"]
        assert (failed["status"], bool(failed["error"]["message"])) == ("failed", True)
        assert (await http.get(f"/v1/responses/{failed['id']}")).status_code == 404

    run(work)


@pytest.mark.parametrize(
    ("more", "param", "message"),
    [
        ({"input": None}, "input", "input is null; expected a string or a list"),
        ({"input": []}, "input", "input is []; expected a string or a list of 1 to"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input", 'input[0].role is "tool"; expected user, assistant'),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input", 'input[0] is of type "item_reference"; expected'),
        ({"input": [{"type": {}, "id": "x"}]}, "input", "input[0] is of type {}; expected"),
        ({"input": [{"role": "user"}]}, "input", "input[0].content is a NoneType; expected a string or a list"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input",
            'input[0].content[0] is of type "input_image"; expected text',
        ),
        ({"input": [{"type": "function_call", "name": "x"}]}, "input", "input[0].arguments is null; expected a string"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input", "input[0].call_id is null"),
        ({"input": "REFUSE"}, "input", "the prompt has 9 tokens"),
        (
            {"max_output_tokens": 0},
            "max_output_tokens",
            "max_output_tokens is 0; expected a number",
        ),
        ({"temperature": -1}, "temperature", "temperature is -1.0; expected"),
        ({"tools": [{"type": "web_search"}]}, "tools", 'tools[0] is of type "web_search"'),
        ({"tools": [{"type": "namespace", "name": "n"}]}, "tools", "tools[0].tools is a NoneType; expected a list"),
        ({"tools": [{"type": "namespace", "tools": [TOOLS[0]]}]}, "tools", "tools[0].name is null; expected a string"),
        (
            {"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "custom"}]}]},
            "tools",
            'tools[0].tools[0] is of type "custom"',
        ),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools", 'tools[0].name is "a b"; expected'),
        (
            {
                "tools": [
                    {"type": "namespace", "name": "n", "tools": TOOLS},
                    {"type": "function", "name": "a.function.b c"},
                ]
            },
            "tools",
            'tools[1].name is "a.function.b c"; expected',
        ),
        (
            {"tools": [TOOLS[0], {"type": "namespace", "name": "n", "tools": [TOOLS[1], {**TOOLS[1], "name": "a b"}]}]},
            "tools",
            'tools[1].tools[1].name is "n.a b"; expected',
        ),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "name": "x"}},
            "tool_choice",
            "tool_choice is the function",
        ),
        ({"tools": TOOLS, "tool_choice": {"type": "mcp"}}, "tool_choice", "tool_choice is "),
        (
            {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "mode": "any", "tools": []}},
            "tool_choice",
            'tool_choice is {"mode": "any", "tools": []}; expected mode auto or required',
        ),
        (
            {
                "tools": TOOLS,
                "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [TOOLS[0] | {"name": "x"}]},
            },
            "tool_choice",
            'tool_choice has "x"; expected functions that tools has',
        ),
        ({"text": {"format": {"type": "x"}}}, "text", "text.format is "),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": 3}}}}, "text", "text.format.schema"),
        ({"text": {"verbosity": "low"}}, "text", "text.verbosity is "),
        ({"background": True}, "background", "background is true, which is not supported"),
        ({"truncation": "auto"}, "truncation", "truncation is "),
        ({"conversation": "c"}, "conversation", "conversation is "),
        ({"prompt": {"id": "p"}}, "prompt", "prompt is "),
        ({"top_logprobs": 2}, "top_logprobs", "top_logprobs is given and include has no"),
        ({"metadata": {"a": 1}}, "metadata", "metadata is an object; expected at most 16 strings"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages", "messages is a field of /v1/chat/completions"),
        ({"n": 2}, "n", "n is a field of /v1/chat/completions"),
    ],
)
def test_bad_fields_name_themselves(more: dict[str, Any], param: str, message: str) -> None:
    response = post({**HI, **more}, ClientDouble(template=TEMPLATE))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["message"].startswith(message), error
    assert error["param"] == param


def test_what_goes_back_with_an_answer_is_bounded_and_can_be_sent() -> None:
    deep: Any = {}
    for _ in range(200):
        deep = {"a": deep}
    client = ClientDouble(template=TEMPLATE)
    for more in (
        {"text": {"format": {"type": "text", "x": deep}}},
        {"tool_choice": {"type": "function", "name": "time", "x": deep}, "tools": TOOLS},
    ):
        refused = post({**HI, **more}, client)
        assert (refused.status_code, "deep" in refused.text) == (400, True), refused.text
    huge = {"type": "function", "name": "f", "parameters": {"type": "object", "maximum": 10**400, "minimum": 10**30}}
    body = {
        "input": "\ud800",
        "instructions": "\udfff",
        "tools": [huge],
        "user": "\ud800",
    }

    async def work(http: Any, _: ClientDouble) -> None:
        made = await http.post("/v1/responses", content=json.dumps(body), headers={"content-type": "application/json"})
        assert made.status_code == 200, made.text
        more = await http.post("/v1/responses", json={"input": "x", "previous_response_id": made.json()["id"]})
        assert more.status_code == 200, more.text

    run(work, client)


@pytest.mark.parametrize("body", [b"[", b'{"input":' + b"[" * 5000 + b"]" * 5000 + b"}", b'{"input":{"x":1}}', b"[1]"])
def test_hostile_bodies_get_an_error_and_harm_no_other(body: bytes) -> None:
    async def work(http: Any, _: ClientDouble) -> None:
        response = await http.post("/v1/responses", content=body, headers={"content-type": "application/json"})
        assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")
        assert (await http.post("/v1/responses", json=HI)).json()["status"] == "completed"

    run(work)


def test_input_tokens_are_counted_as_an_answer_would_have_them() -> None:
    async def work(http: Any, _: ClientDouble) -> None:
        first = (await http.post("/v1/responses", json={**HI, "tools": TOOLS, "instructions": "I"})).json()
        body = {"input": "more", "previous_response_id": first["id"], "tools": TOOLS}
        counted = (await http.post("/v1/responses/input_tokens", json=body)).json()
        usage = (await http.post("/v1/responses", json=body)).json()["usage"]
        assert counted == {"object": "response.input_tokens", "input_tokens": usage["input_tokens"]}

    run(work, ClientDouble(template=TEMPLATE))


@pytest.mark.parametrize("stream", [False, True])
def test_functions_of_a_namespace_are_told_apart(stream: bool) -> None:
    tools = [{"type": "namespace", "name": "city", "description": "d", "tools": TOOLS}, TOOLS[1]]
    answer = CALLS.replace('"weather"', '"city.weather"')
    client = ClientDouble(answer=answer, template=TEMPLATE)
    earlier = {"type": "function_call", "call_id": "t1", "name": "time", "namespace": "city", "arguments": "{}"}
    body = {"input": [{"role": "user", "content": "x"}, earlier], "tools": tools, "stream": stream}
    response = post(body, client)
    made = events_of(response.text)[-1]["response"] if stream else response.json()
    assert "t1=city.time{}" in prompt_of(client)
    weather, time = made["output"][-2:]
    assert (weather["namespace"], weather["name"]) == ("city", "weather")
    assert (time.get("namespace"), time["name"]) == (None, "time")
    assert made["tools"] == tools
    choice = {"type": "function", "namespace": "city", "name": "time"}
    forced = ClientDouble(template=TEMPLATE)
    assert post({**body, "stream": False, "tool_choice": choice}, forced).status_code == 200
    assert forced.seen[0].params.grammar is not None
    assert "city.time" in forced.seen[0].params.grammar.text
