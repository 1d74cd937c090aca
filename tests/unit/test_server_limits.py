"""Limits as a client meets them: a full queue, requests that take too long, bodies that do not come."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.unit.server_double import ClientDouble, run, serving
from tests.unit.test_server_errors import error_of
from thalweg.server.settings import LONG_TEXT, ServerSettings

ROOM = ServerSettings(max_queued_requests=2)  # beyond the double's 4 slots


def served(work: Any, settings: ServerSettings) -> Any:
    async def main() -> Any:
        client = ClientDouble()
        async with serving(client, settings) as http:
            return await asyncio.wait_for(work(http, client), 10)

    return asyncio.run(main())


def counted(text: str, name: str) -> float:
    [line] = [line for line in text.splitlines() if line.startswith(f"thalweg_{name} ")]
    return float(line.split()[1])


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_429_with_retry_after_until_something_ends(stream: bool) -> None:
    async def work(http: Any, client: ClientDouble) -> None:
        async def ask(prompt: Any) -> Any:
            return await http.post("/v1/completions", json={"prompt": prompt, "stream": stream})

        held = [asyncio.create_task(ask("QUEUED")) for _ in range(5)]
        while len(client.seen) < 5:
            await asyncio.sleep(0.001)
        assert (await ask("x")).status_code == 200  # the sixth place
        for prompt in (["x", "y"], ["x"] * 6):  # all of a request's sequences are taken, or none
            response = await ask(prompt)
            assert response.status_code == 429
            assert error_of(response)["code"] == "queue_full"
            assert "--max-queued-requests" in error_of(response)["message"]
            assert int(response.headers["retry-after"]) > 0
        assert len(client.seen) == 6
        held[0].cancel()
        await asyncio.gather(held[0], return_exceptions=True)
        assert (await ask(["x", "y"])).status_code == 200
        text = (await http.get("/metrics")).text
        assert counted(text, 'requests_rejected_total{reason="queue_full"}') == 2
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        assert http.app.state.service._unfinished == 0

    served(work, ROOM)


def test_a_request_that_no_queue_could_hold_is_400() -> None:
    async def work(http: Any, _: ClientDouble) -> None:
        response = await http.post("/v1/completions", json={"prompt": ["x"] * 7})
        assert response.status_code == 400
        assert "--max-queued-requests" in error_of(response)["message"]

    served(work, ROOM)


def test_failed_requests_give_their_places_back() -> None:
    async def work(http: Any, _: ClientDouble) -> None:
        for word in ("REFUSE", "FAIL", "WAITED", "LATE", "DIE"):
            for prompt in (word, [word, "HANG"]):
                for stream in (False, True):
                    await http.post("/v1/completions", json={"prompt": prompt, "stream": stream})
                    assert http.app.state.service._unfinished == 0, word

    served(work, ROOM)


@pytest.mark.parametrize(
    ("word", "status", "code"), [("WAITED", 503, "queue_timeout"), ("LATE", 504, "request_timeout")]
)
def test_timeouts_have_a_status_and_are_counted(word: str, status: int, code: str) -> None:
    async def work(http: Any, client: ClientDouble) -> None:
        for body in ({"prompt": word}, {"prompt": word, "stream": True}, {"prompt": [word, "HANG"]}):
            response = await http.post("/v1/completions", json=body)
            assert (response.status_code, error_of(response)["code"]) == (status, code)
            assert ("retry-after" in response.headers) == (code == "queue_timeout")
        assert len(client.aborted) == 1  # the other prompt's sequence does not go on
        assert counted((await http.get("/metrics")).text, f'requests_rejected_total{{reason="{code}"}}') == 3

    run(work)


def test_a_body_that_does_not_come_is_408() -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b'{"prompt": '
        await asyncio.sleep(5)
        yield b'"x"}'

    async def work(http: Any, _: ClientDouble) -> None:
        response = await http.post("/v1/completions", content=slow(), headers={"content-type": "application/json"})
        assert response.status_code == 408
        assert "0.1 s" in error_of(response)["message"]
        # A body that has come leaves its answer all the time it needs.
        task = asyncio.create_task(http.post("/v1/completions", json={"prompt": "HANG"}))
        await asyncio.sleep(0.3)
        assert not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    served(work, ServerSettings(body_seconds=0.1))


DEEP = '{"prompt": "x", "response_format": ' + '{"a": ' * 50_000 + "1" + "}" * 50_000 + "}"


@pytest.mark.parametrize(
    "content",
    [
        DEEP,
        '{"prompt": "x", "user": ' + "[" * 50_000 + "]" * 50_000 + "}",
        '{"prompt": "x", "max_tokens": 1' + "0" * 5000 + "}",
        '{"prompt": "x", "temperature": 1e999}',
        '{"prompt": "x", "top_p": NaN}',
        '{"prompt": "x", "logit_bias": {"1": Infinity}}',
        '{"prompt": "x", "logit_bias": {"-1": 1}}',
        '{"prompt": "x", "seed": -9223372036854775809}',
        '{"prompt": "x", "stop": "' + "x" * 1025 + '"}',
        '{"prompt": "x", "stop": "\\ud800"}',
        '{"prompt": "x", "logit_bias": {"\\ud800": "x"}}',
        '{"prompt": "x", "structured_outputs": {"regex": "\\ud800"}}',
        '{"prompt": "x", "structured_outputs": {"choice": ["\\ud800"]}}',
        '{"prompt": "x", "best_of": -1}',
        '{"prompt": "x", "n": 1000000000}',
    ],
)
def test_hostile_values_are_400(content: str) -> None:
    async def work(http: Any, _: ClientDouble) -> None:
        response = await http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert response.status_code == 400
        error_of(response)

    run(work)


@pytest.mark.parametrize("stream", [False, True])
def test_half_characters_and_nulls_in_a_prompt_come_back_as_text(stream: bool) -> None:
    async def work(http: Any, _: ClientDouble) -> None:
        for prompt in ("a\\u0000b", "\\ud800", "\\ud83d\\ude00"):
            content = f'{{"prompt": "{prompt}", "echo": true, "stream": {json.dumps(stream)}}}'
            response = await http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
            assert response.status_code == 200
            assert "error" not in response.text

    run(work)


@pytest.mark.parametrize("element", ['"x"', "0.5", "260"])
def test_a_million_wrong_elements_hold_nobody_up(element: str) -> None:
    content = f'{{"prompt": [{", ".join([element] * 1_000_000)}]}}'

    async def work(http: Any, _: ClientDouble) -> None:
        began = time.thread_time()
        response = await http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert response.status_code == 400
        assert error_of(response)["param"] == "prompt"
        assert time.thread_time() - began < 2

    run(work)


def test_long_conversations_are_laid_out_beside_the_event_loop_wherever_their_text_is() -> None:
    long, threads = "x" * LONG_TEXT, []

    async def work(http: Any, client: ClientDouble) -> None:
        def chat_ids(*_: Any, **__: Any) -> list[int]:
            threads.append(threading.current_thread() is threading.main_thread())
            return [1]

        client.codec.chat_ids = chat_ids
        for message in (
            {"content": "x"},
            {"content": long},
            {"content": [{"type": "text", "text": long}]},
            {"content": "x", "reasoning_content": long},
        ):
            for path in ("/v1/chat/completions", "/tokenize"):
                assert (await http.post(path, json={"messages": [{"role": "user", **message}]})).status_code == 200

    run(work)
    assert threads == [True] * 2 + [False] * 6


def test_a_template_in_a_request_is_not_used() -> None:
    async def work(http: Any, client: ClientDouble) -> None:
        body = {"messages": [{"role": "user", "content": "hi"}], "chat_template": "{{ 1 }}"}
        for path in ("/v1/chat/completions", "/tokenize"):
            response = await http.post(path, json=body)
            assert (response.status_code, response.json()["error"]["param"]) == (400, "chat_template")
        assert not client.seen

    run(work)
