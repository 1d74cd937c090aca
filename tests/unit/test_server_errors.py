"""What goes wrong: bad bodies, refusals, failing requests and engines, keys, sizes, clients that leave."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.unit.server_double import ClientDouble, run, serving
from thalweg.core import SchedulerStats
from thalweg.server.errors import shown
from thalweg.server.settings import MAX_PROMPTS, ServerSettings

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
TEXT = {"prompt": "hi"}

LARGE: dict[str, Any] = {"enum": ["x" * 1000] * 200}
DEEP: dict[str, Any] = {}
for _ in range(70):
    DEEP = {"items": DEEP}


def error_of(response: Any) -> dict[str, Any]:
    assert list(response.json()) == ["error"]
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return error


def post(path: str, **kwargs: Any) -> Any:
    async def work(http: Any, _: ClientDouble) -> Any:
        return await http.post(path, **kwargs)

    return run(work)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages"),
        ({**CHAT, "temperature": "0.5"}, "temperature"),
        ({**CHAT, "temperature": 200}, "temperature"),
        ({**CHAT, "temperature": -0.1}, "temperature"),
        ({**CHAT, "top_p": 0}, "top_p"),
        ({**CHAT, "top_k": -2}, "top_k"),
        ({**CHAT, "max_tokens": -2}, "max_tokens"),
        ({**CHAT, "max_tokens": 1.5}, "max_tokens"),
        ({**CHAT, "max_tokens": True}, "max_tokens"),
        ({**CHAT, "max_tokens": 10**30}, "max_tokens"),
        ({**CHAT, "n": 0}, "n"),
        ({**CHAT, "n": 17}, "n"),
        ({**CHAT, "seed": 2**64}, "seed"),
        ({**CHAT, "stop": 7}, "stop"),
        ({**CHAT, "stop": [""]}, "stop"),
        ({**CHAT, "stop": ["x"] * 65}, "stop"),
        ({**CHAT, "stop_token_ids": [260]}, "stop_token_ids"),
        ({**CHAT, "logit_bias": {"x": 1}}, "logit_bias"),
        ({**CHAT, "logit_bias": {"260": 1}}, "logit_bias"),
        ({**CHAT, "logit_bias": {"1": 101}}, "logit_bias"),
        ({**CHAT, "logprobs": 1}, "logprobs"),
        ({**CHAT, "logprobs": True, "top_logprobs": 65}, "logprobs"),
        ({**CHAT, "top_logprobs": 1}, "top_logprobs"),
        ({**CHAT, "stream_options": {"include_usage": True}}, "stream_options"),
        ({**CHAT, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({**CHAT, "chat_template_kwargs": []}, "chat_template_kwargs"),
        ({**CHAT, "response_format": {"type": "xml"}}, "response_format"),
        ({**CHAT, "response_format": {"type": "json_schema"}}, "response_format"),
        ({**CHAT, "response_format": {"type": "json_schema", "json_schema": {"schema": []}}}, "response_format"),
        ({**CHAT, "response_format": {"type": "json_schema", "json_schema": {"schema": DEEP}}}, "response_format"),
        ({**CHAT, "response_format": {"type": "json_schema", "json_schema": {"schema": LARGE}}}, "response_format"),
        ({**CHAT, "response_format": {"type": "json_object"}, "structured_outputs": {}}, "structured_outputs"),
        ({**CHAT, "structured_outputs": {}}, "structured_outputs"),
        ({**CHAT, "structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({**CHAT, "structured_outputs": {"regex": 7}}, "structured_outputs"),
        ({**CHAT, "structured_outputs": {"choice": [""]}}, "structured_outputs"),
        ({**CHAT, "structured_outputs": {"grammar": "x" * 200_000}}, "structured_outputs"),
        ({**CHAT, "tools": [{"type": "function"}]}, "tools"),
        ({**CHAT, "tools": [{"type": "function"}], "tool_choice": "auto"}, "tools"),
        ({**CHAT, "tools": {}}, "tools"),
        ({**CHAT, "tool_choice": "required"}, "tool_choice"),
    ],
)
def test_bad_chat_fields_name_themselves(body: dict[str, Any], param: str) -> None:
    response = post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [260]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a"] * (MAX_PROMPTS + 1)}, "prompt"),
        ({"prompt": ["a"] * MAX_PROMPTS, "n": 2}, "n"),
        ({"prompt": "REFUSE"}, "prompt"),
        ({"prompt": "REFUSE", "stream": True}, "prompt"),
        ({"prompt": ["a", "REFUSE"]}, "prompt"),
        ({**TEXT, "logprobs": 65}, "logprobs"),
        ({**TEXT, "suffix": "x"}, "suffix"),
        ({**TEXT, "best_of": 3}, "best_of"),
    ],
)
def test_bad_completion_fields_name_themselves(body: dict[str, Any], param: str) -> None:
    response = post("/v1/completions", json=body)
    assert response.status_code == 400
    assert error_of(response)["param"] == param


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"messages": ' + b"[" * 100_000, b'{"temperature": NaN, "prompt": "x"}'],
)
def test_bodies_that_are_no_json_object(content: bytes) -> None:
    response = post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    error_of(response)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"prompt": "\xff"}', "it is not UTF-8"),
        (b'{"prompt": ' + b"[" * 100_000, "it nests too deep"),
        (b'{"prompt": "x", "n": ' + b"9" * 10_000 + b"}", "it holds a number of too many digits"),
    ],
)
def test_bodies_that_cannot_be_read_say_why(content: bytes, reason: str) -> None:
    error = error_of(post("/v1/completions", content=content, headers={"content-type": "application/json"}))
    assert error["message"] == f"the body is not valid JSON: {reason}"
    assert error["code"] == "invalid_json"


def test_half_a_surrogate_pair_is_no_accident() -> None:
    headers = {"content-type": "application/json"}
    echoed = post("/v1/completions", content=rb'{"prompt": "\ud800", "echo": true}', headers=headers)
    assert echoed.json()["choices"][0]["text"].startswith("\ufffd")
    refused = post("/v1/completions", content=rb'{"prompt": "x", "logit_bias": {"\ud800": "x"}}', headers=headers)
    assert refused.status_code == 400
    assert error_of(refused)["param"] == "logit_bias"


def test_a_conversation_that_is_too_long_names_the_messages() -> None:
    error = error_of(post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "REFUSE"}]}))
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")


def test_a_form_is_no_json() -> None:
    response = post("/v1/completions", content=json.dumps(TEXT), headers={"content-type": "text/plain"})
    assert response.status_code == 400
    assert "application/json" in error_of(response)["message"]


def test_unknown_model_route_and_method() -> None:
    async def work(http: Any, _: ClientDouble) -> None:
        response = await http.post("/v1/chat/completions", json={**CHAT, "model": "gpt-4"})
        assert response.status_code == 404
        assert error_of(response)["code"] == "model_not_found"
        assert "double" in error_of(response)["message"]
        for name in ("double", "models/double"):
            assert (await http.post("/v1/chat/completions", json={**CHAT, "model": name})).status_code == 200
        assert (await http.get("/v1/models/gpt-4")).status_code == 404
        response = await http.get("/v2/models")
        assert (response.status_code, error_of(response)["code"]) == (404, "unknown_route")
        response = await http.get("/v1/completions")
        assert (response.status_code, error_of(response)["code"]) == (405, "unknown_route")

    run(work)


def test_served_names_come_first() -> None:
    async def main() -> None:
        async with serving(ClientDouble(), ServerSettings(served_model_names=("one", "two"))) as http:
            assert [m["id"] for m in (await http.get("/v1/models")).json()["data"]] == ["one", "two"]
            for name in ("one", "two", "double"):
                answer = (await http.post("/v1/completions", json={**TEXT, "model": name})).json()
                assert answer["model"] == "one"

    asyncio.run(main())


@pytest.mark.parametrize(("word", "status"), [("FAIL", 500), ("DIE", 503)])
def test_a_failing_request_is_an_error_in_either_form(word: str, status: int) -> None:
    async def work(http: Any, client: ClientDouble) -> None:
        response = await http.post("/v1/completions", json={"prompt": [word, "HANG"]})
        assert response.status_code == status
        assert error_of(response)["type"] == "server_error"
        assert len(client.aborted) == 1  # the other prompt's sequence does not go on
        response = await http.post("/v1/completions", json={"prompt": word, "stream": True})
        assert response.status_code == 200
        *first, last = response.text.removesuffix("\n\n").split("\n\n")
        assert "".join(json.loads(e[6:])["choices"][0]["text"] for e in first) == "He"
        assert json.loads(last[6:])["error"]["type"] == "server_error"

    run(work)


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_gives_up_is_the_callers_mistake(stream: bool) -> None:
    async def work(http: Any, _: ClientDouble) -> tuple[Any, str]:
        body = {"prompt": "STUCK", "stream": stream, "structured_outputs": {"regex": "a+"}}
        return await http.post("/v1/completions", json=body), (await http.get("/metrics")).text

    response, metrics = run(work)
    assert response.status_code == (200 if stream else 400)
    error = json.loads(response.text.rstrip().split("\n\n")[-1][6:])["error"] if stream else error_of(response)
    assert (error["type"], error["param"]) == ("invalid_request_error", "structured_outputs")
    assert (error["code"], error["message"]) == ("invalid_grammar", "the grammar cannot go on: too many items")
    assert 'request_refused_total{reason="invalid_grammar"} 1.0' in metrics
    assert 'request_success_total{finished_reason="error"} 0.0' in metrics


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("completions", {"prompt": "REFUSE"}, "context_length_exceeded"),
        ("completions", {"prompt": ["REFUSE", "REFUSE"]}, "context_length_exceeded"),
        ("chat/completions", {"messages": [{"role": "user", "content": "REFUSE"}]}, "context_length_exceeded"),
        ("completions", {"prompt": "x", "logit_bias": {"260": 1}}, "invalid_value"),
        ("completions", {"prompt": "x", "temperature": -1}, "invalid_value"),
        ("completions", {"prompt": "x", "temperature": "hot"}, "invalid_value"),
        ("completions", {"prompt": "x", "suffix": "y"}, "unsupported"),
        ("completions", {"prompt": "x", "model": "gpt"}, "model_not_found"),
        ("nothing", {}, "unknown_route"),
    ],
)
def test_a_callers_mistake_is_counted_once_and_is_no_failure(
    path: str, body: dict[str, Any], reason: str, stream: bool
) -> None:
    async def work(http: Any, _: ClientDouble) -> str:
        response = await http.post(f"/v1/{path}", json={**body, "stream": stream})
        assert 400 <= response.status_code < 500
        return (await http.get("/metrics")).text

    metrics = run(work)
    counts = dict(re.findall(r'^thalweg_request_refused_total{reason="(\w+)"} (\S+)', metrics, re.MULTILINE))
    assert {name for name, count in counts.items() if count != "0.0"} == {reason}
    assert counts[reason] == "1.0"
    assert 'request_success_total{finished_reason="error"} 0.0' in metrics


def test_a_failure_of_the_engines_is_counted_as_one() -> None:
    async def work(http: Any, _: ClientDouble) -> str:
        assert (await http.post("/v1/completions", json={"prompt": "FAIL"})).status_code == 500
        return (await http.get("/metrics")).text

    metrics = run(work)
    assert 'request_success_total{finished_reason="error"} 1.0' in metrics
    assert not re.search(r"request_refused_total{.*} [1-9]", metrics)


def test_a_dead_engine_is_503_everywhere_but_metrics() -> None:
    async def work(http: Any, client: ClientDouble) -> None:
        from thalweg.errors import EngineDeadError

        client.dead = EngineDeadError("the engine process ended with exit code 1")
        for path in ("/health", "/v1/models"):
            response = await http.get(path)
            assert (response.status_code, error_of(response)["code"]) == (503, "engine_dead")
        assert (await http.post("/v1/chat/completions", json={**CHAT, "stream": True})).status_code == 503
        assert (await http.get("/metrics")).status_code == 200

    run(work)


def test_unforeseen_errors_say_nothing_of_the_inside() -> None:
    async def work(http: Any, client: ClientDouble) -> None:
        client.codec.chat_ids = None
        response = await http.post("/v1/chat/completions", json=CHAT)
        assert response.status_code == 500
        assert "NoneType" not in error_of(response)["message"]

    run(work)


def test_503_until_the_engine_is_ready() -> None:
    async def main() -> None:
        client = ClientDouble()
        client.may_start.clear()
        info = client.info
        del client.info  # as of an engine that has yet to say what it is
        async with serving(client) as http:
            assert (await http.get("/metrics")).status_code == 200
            for response in (await http.get("/health"), await http.post("/v1/completions", json=TEXT)):
                assert response.status_code == 503
                assert error_of(response)["code"] == "engine_starting"
                assert response.headers["retry-after"] == "1"
            client.info = info
            client.may_start.set()
            await asyncio.sleep(0.01)
            assert (await http.get("/health")).status_code == 200
        assert client.closed

    asyncio.run(main())


def test_api_key() -> None:
    async def main() -> None:
        async with serving(ClientDouble(), ServerSettings(api_keys=("sécret",))) as http:
            assert (await http.get("/health")).status_code == 200
            for path in ("/v1/models", "/version", "/metrics", "/openapi.json", "/nowhere", "/health/"):
                for value in (None, "", "sécret", "Bearer ", "Bearer sécre", "Bearer sécret2", "Basic sécret"):
                    headers = {} if value is None else {"authorization": value.encode()}
                    response = await http.get(path, headers=headers)
                    assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")
            # Headers that name another path change nothing.
            headers = {"x-forwarded-path": "/health", "x-original-url": "/health"}
            assert (await http.get("/v1/models", headers=headers)).status_code == 401
            for scheme in ("Bearer", "bearer"):  # schemes have no case (RFC 9110, 11.1)
                headers = {"authorization": f"{scheme} sécret".encode()}
                assert (await http.get("/v1/models", headers=headers)).status_code == 200

    asyncio.run(main())


def test_api_key_from_a_browser() -> None:
    async def main() -> None:
        async with serving(ClientDouble(), ServerSettings(api_keys=("sécret",))) as http:
            asked = await http.get("/")
            assert (asked.status_code, asked.headers["www-authenticate"]) == (401, 'Basic realm="API key"')
            assert (await http.get("/page/chat.js")).headers["www-authenticate"] == "Bearer"
            headers = {"authorization": "Basic " + base64.b64encode("me:sécret".encode()).decode()}
            for path in ("/", "/page/chat.js", "/page/chat.css", "/v1/models"):
                assert (await http.get(path, headers=headers)).status_code == 200
            # The page itself, then somebody else's page in the same browser.
            own = headers | {"origin": str(http.base_url)}
            assert (await http.post("/v1/completions", json=TEXT, headers=own)).status_code == 200
            for origin in ("http://elsewhere.example", "null", "https://double.example.org:1"):
                other = headers | {"origin": origin}
                assert (await http.post("/v1/completions", json=TEXT, headers=other)).status_code == 401
            for wrong in ("me:secret", "sécret", "sécret:", "me:sécret:"):
                given = {"authorization": "Basic " + base64.b64encode(wrong.encode()).decode()}
                assert (await http.get("/", headers=given)).status_code == 401
            assert (await http.get("/", headers={"authorization": "Basic ?"})).status_code == 401

    asyncio.run(main())


def test_the_page_loads_nothing_from_elsewhere() -> None:
    async def main() -> None:
        async with serving(ClientDouble()) as http:
            for path in ("/", "/dashboard"):
                page = await http.get(path)
                assert page.headers["content-type"] == "text/html; charset=utf-8"
                assert "default-src 'none'" in page.headers["content-security-policy"]
                parts = re.findall(r'(?:src|href)="([^"]*)"', page.text)
                assert {"page/chat.css", "page/theme.js"} <= set(parts)
                for part in parts:
                    found = await http.get(f"/{part}")
                    assert (found.status_code, "//" in part) == (200, False)
                    assert not re.search(r"(?:src|href|url|import|fetch)\W{1,3}(?:https?:)?//", found.text)
            for wrong in ("/page/__init__.py", "/page/..%2fguard.py", "/page/"):
                assert (await http.get(wrong)).status_code == 404

    asyncio.run(main())


def test_large_bodies_are_refused_with_and_without_a_length() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 100

    async def main() -> None:
        async with serving(ClientDouble(), ServerSettings(max_body_bytes=1000)) as http:
            headers = {"content-type": "application/json"}
            for content in (b" " * 1001, pieces()):
                response = await http.post("/v1/completions", content=content, headers=headers)
                assert response.status_code == 413
                assert "1000 bytes" in error_of(response)["message"]

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        *(("/v1/completions", {"prompt": prompt}) for prompt in ("HANG", "QUEUED", ["HANG", "QUEUED", "x"])),
        *(("/v1/responses", {"input": prompt}) for prompt in ("HANG", "QUEUED")),
        *(
            ("/v1/messages", {"messages": [{"role": "user", "content": prompt}], "max_tokens": 9})
            for prompt in ("HANG", "QUEUED")
        ),
    ],
)
def test_a_client_that_leaves_ends_its_sequences(path: str, fields: dict[str, Any], stream: bool) -> None:
    async def work(http: Any, client: ClientDouble) -> None:
        left = asyncio.Event()
        body = json.dumps({**fields, "stream": stream}).encode()
        requests = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict[str, Any]:
            for message in requests:
                return message
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            pass

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "http_version": "1.1",
            "server": ("test", 80),
            "client": ("test", 1),
            "headers": [(b"content-type", b"application/json")],
        }
        app = asyncio.create_task(http.app(scope, receive, send))
        many = isinstance(fields.get("prompt"), list)
        while len(client.seen) < (3 if many else 1):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2 if many else 0.05)  # in which the last of several prompts is answered
        assert not client.aborted
        left.set()
        await asyncio.wait_for(app, 1)
        assert len(client.aborted) == (2 if many else 1)
        metrics = (await http.get("/metrics")).text
        assert f'request_success_total{{finished_reason="abort"}} {len(client.aborted)}.0' in metrics

    run(work)


def test_metrics() -> None:
    async def work(http: Any, client: ClientDouble) -> str:
        await http.post("/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 4})
        client.stats = SchedulerStats(
            num_running=1,
            num_waiting=2,
            blocks_used=3,
            blocks_total=12,
            slots_used=5,
            slots_total=6,
            num_preemptions=7,
            prompt_tokens=8,
            generation_tokens=9,
            blocks_kept=10,
            snapshots_used=11,
            snapshots_total=12,
            prefix_queries=13,
            prefix_hits=14,
            prefix_misses={"evicted": 15},
        )
        response = await http.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        return response.text

    lines = set(run(work).splitlines())
    for line in (
        "thalweg_num_requests_running 1.0",
        "thalweg_num_requests_waiting 2.0",
        "thalweg_kv_cache_usage_perc 0.25",
        "thalweg_state_slots_used 5.0",
        "thalweg_state_slots_total 6.0",
        "thalweg_num_preemptions_total 7.0",
        "thalweg_prompt_tokens_total 8.0",
        "thalweg_generation_tokens_total 9.0",
        "thalweg_kv_blocks_kept 10.0",
        "thalweg_state_snapshots_used 11.0",
        "thalweg_state_snapshots_total 12.0",
        "thalweg_prefix_cache_queries_total 13.0",
        "thalweg_prefix_cache_hits_total 14.0",
        'thalweg_prefix_cache_misses_total{reason="evicted"} 15.0',
        'thalweg_prefix_cache_misses_total{reason="other_salt"} 0.0',
        'thalweg_request_success_total{finished_reason="length"} 2.0',
        "thalweg_time_to_first_token_seconds_count 2.0",
        "thalweg_inter_token_latency_seconds_count 6.0",
        "thalweg_e2e_request_latency_seconds_count 2.0",
    ):
        assert line in lines, line


def test_ids_that_are_no_tokens_name_their_field() -> None:
    async def work(http: Any, _: ClientDouble) -> None:
        response = await http.post("/detokenize", json={"tokens": [1, 10**6]})
        assert response.status_code == 400
        assert error_of(response)["param"] == "tokens"
        assert error_of(response)["message"].startswith("token 1 is 1000000")

    run(work)


def test_a_value_nested_too_deep_to_show_is_named_by_its_type() -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    assert shown(value) == "list"
    assert shown(["x"]) == '["x"]'


@pytest.mark.parametrize(
    ("content", "headers", "status", "message"),
    [
        (b"", {}, 400, "the body is empty; expected a JSON object"),
        (b"[1]", {}, 400, "the body is a list; expected a JSON object"),
        (b'"x"', {}, 400, 'the body is "x"; expected a JSON object'),
        (b"{}", {"content-type": "application/x-www-form-urlencoded"}, 400, "the body did not come as JSON; expected"),
        (b"\x1f\x8b", {"content-encoding": "gzip"}, 415, "the body is encoded as gzip; expected it without"),
        (b"{}", {}, 400, "messages is missing; expected a value"),
        (b'{"messages": "x"}', {}, 400, 'messages is "x"; expected a list'),
        (b'{"messages": [7]}', {}, 400, "messages[0] is 7; expected an object"),
        (b'{"messages": [{}], "max_tokens": "5"}', {}, 400, 'max_tokens is "5"; expected an integer'),
        (b'{"messages": [{}], "stream": [[1]]}', {}, 400, "stream is a list; expected true or false"),
        (b'{"messages": [{}], "stop": {"a": 1}}', {}, 400, "stop is an object; expected a string or a list"),
        (b'{"messages": [{}], "n": 99}', {}, 400, "n is 99; expected a number less than or equal to 16"),
    ],
)
def test_a_body_that_cannot_be_read_is_told_what_came(
    content: bytes, headers: dict[str, str], status: int, message: str
) -> None:
    async def work(http: Any, _: ClientDouble) -> Any:
        every = {"content-type": "application/json", **headers}
        return await http.post("/v1/chat/completions", content=content, headers=every)

    response = run(work)
    assert response.status_code == status
    assert error_of(response)["message"].startswith(message), response.text


def test_a_base_url_with_a_v1_too_many_or_too_few_is_told_the_route() -> None:
    async def work(http: Any, _: ClientDouble) -> None:
        for path, expected in (
            ("/v1/v1/messages", "expected /v1/messages"),
            ("/chat/completions", "expected /v1/chat/completions"),
            ("/v1/tokenize", "see /docs"),
            ("/v1/v1/x", "see /docs"),
        ):
            response = await http.post(path, json={})
            assert response.status_code == 404
            assert response.json()["error"]["message"] == f"POST {path} is not a route of this server; {expected}"

    run(work)
