"""`thalweg eval --base-url`: against a stand-in server that answers, and against ones that misbehave."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from thalweg.cli import main
from thalweg.evals import server as server_module
from thalweg.evals.runner import Question, Score, Task, last_number
from thalweg.evals.server import Examiner, Patience, _seconds
from thalweg.http_client import HttpClient

Handler = Callable[[dict[str, Any]], Awaitable[bytes | None]]


def answer(status: int, body: Any, *headers: str) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(content)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def completion(text: str, tokens: int | None = 7) -> bytes:
    usage = {} if tokens is None else {"usage": {"completion_tokens": tokens}}
    return answer(200, {"choices": [{"text": text}], **usage})


class StandIn:
    """Answers each request by `handler(body)`; None hangs up."""

    def __init__(self, handler: Handler) -> None:
        self._handler, self.requests, self.now, self.most = handler, [], 0, 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                body = json.loads(await reader.readexactly(length) or b"null")
                self.requests.append((head.split()[1].decode(), head, body))
                self.now += 1
                self.most = max(self.most, self.now)
                reply = await self._handler(body)
                self.now -= 1
                if reply is None:
                    break
                writer.write(reply)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()


def ask(
    handler: Handler, count: int = 4, *, parallel: int = 2, patience: Patience | None = None
) -> tuple[Score, Examiner, StandIn]:
    """Questions 0, 1, ... whose answers are the same numbers."""

    async def run() -> tuple[Score, Examiner, StandIn]:
        stand_in = StandIn(handler)
        server = await asyncio.start_server(stand_in.serve, "127.0.0.1", 0)
        http = HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "key")
        task = Task([Question(str(i), f"ask {i}", i) for i in range(count)], last_number, 16, ("Question",))
        examiner = Examiner(http, "m", parallel, patience or Patience(5.0, 2))
        try:
            return await asyncio.wait_for(examiner.evaluate(task), 20), examiner, stand_in
        finally:
            http.close()
            server.close()

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "FIRST_WAIT_S", 0.01)


def number(body: dict[str, Any]) -> int:
    return int(body["prompt"].split()[1])


def test_requests_and_figures() -> None:
    async def handler(body: dict[str, Any]) -> bytes:
        await asyncio.sleep(0.02)
        return completion(f"it is {number(body) if number(body) != 3 else 99}")

    score, examiner, stand_in = ask(handler, 8, parallel=4)
    assert (score.num_questions, score.accuracy, score.invalid, score.errors) == (8, 7 / 8, 0.0, 0)
    assert (score.output_tokens, examiner.retries) == (56, 0)
    assert score.output_throughput == pytest.approx(56 / score.latency_s)
    assert stand_in.most == 4
    path, head, body = stand_in.requests[0]
    assert path == "/v1/completions"
    assert b"authorization: bearer key" in head.lower()
    assert body == {"model": "m", "temperature": 0, "max_tokens": 16, "stop": ["Question"], "prompt": "ask 0"}


def test_one_that_fails_is_counted_and_the_others_go_on() -> None:
    async def handler(body: dict[str, Any]) -> bytes | None:
        match number(body):
            case 0:
                return answer(500, {"error": {"message": "broken"}})
            case 1:
                return None
            case 2:
                return answer(400, {"error": {"message": "bad"}})
            case 3:
                return answer(200, b"not JSON")
            case 4:
                return answer(200, {"choices": []})
            case 5:
                return b"SSH-2.0-x\r\n\r\n"
        return completion(f"#### {number(body)}")

    score, examiner, stand_in = ask(handler, 10)
    assert (score.accuracy, score.invalid, score.errors) == (0.4, 0.6, 6)
    errors = [r.error for r in score.results]
    for error, words in zip(
        errors, ["500: broken", "closed", "400: bad", "not a comp", "not a comp", "HTTP"], strict=False
    ):
        assert error is not None
        assert words in error
    assert errors[6:] == [None] * 4
    # What may come right is asked two times more; what is the request's own fault, or a bad answer, is not.
    asked = [number(body) for _, _, body in stand_in.requests]
    assert [asked.count(i) for i in (0, 2, 3, 4, 6)] == [3, 1, 1, 1, 1]
    assert asked.count(1) >= 3  # and once more for each kept connection, which may have been closed before it was used
    assert examiner.retries == 6


def test_a_server_that_is_busy_is_asked_again_when_it_says() -> None:
    refused: dict[int, float] = {}

    async def handler(body: dict[str, Any]) -> bytes:
        n = number(body)
        if n not in refused:
            refused[n] = time.monotonic()
            return answer(429, {"error": {"message": "busy"}}, "Retry-After: 1")
        assert time.monotonic() - refused[n] >= 0.99
        return completion(f"{n}")

    score, examiner, _ = ask(handler, 3, parallel=3)
    assert (score.accuracy, score.errors, examiner.retries) == (1.0, 0, 3)


def test_a_slow_answer_is_an_error_and_is_not_asked_for_again() -> None:
    async def handler(body: dict[str, Any]) -> bytes:
        await asyncio.sleep(5 if number(body) == 1 else 0)
        return completion(f"{number(body)}")

    score, _, stand_in = ask(handler, 3, patience=Patience(0.2, 3))
    assert [r.error for r in score.results] == [None, "no answer within 0.2 s", None]
    assert len(stand_in.requests) == 3


def test_without_usage_there_is_no_throughput() -> None:
    async def handler(body: dict[str, Any]) -> bytes:
        return completion(f"{number(body)}", 7 if number(body) else None)

    score, _, _ = ask(handler, 3)
    assert (score.accuracy, score.output_tokens, score.output_throughput) == (1.0, None, None)


def test_chats_go_to_chat_and_an_answer_without_content_is_invalid() -> None:
    async def handler(body: dict[str, Any]) -> bytes:
        content = None if body["messages"][0]["content"] == "b" else "#### 5"
        return answer(200, {"choices": [{"message": {"content": content}}], "usage": {"completion_tokens": 1}})

    async def run() -> tuple[Score, StandIn]:
        stand_in = StandIn(handler)
        server = await asyncio.start_server(stand_in.serve, "127.0.0.1", 0)
        http = HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        questions = [Question(text, [{"role": "user", "content": text}], 5) for text in "ab"]
        async with server:
            score = await Examiner(http, "m", 1, Patience()).evaluate(Task(questions, last_number, 4))
            http.close()
        return score, stand_in

    score, stand_in = asyncio.run(run())
    assert (score.accuracy, score.invalid, score.errors) == (0.5, 0.5, 0)
    assert {path for path, _, _ in stand_in.requests} == {"/v1/chat/completions"}
    assert "stop" not in stand_in.requests[0][2]


def test_retry_after_is_seconds_or_a_date_and_bounded() -> None:
    assert [_seconds(text) for text in (None, "3", " 0 ", "soon", "-5", "999999999")] == [None, 3, 0, None, None, 60]
    assert _seconds(format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)) == pytest.approx(20, abs=2)
    assert _seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert _seconds("Wed, 21 Oct 2015 07:28:00") is None  # of no time zone


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("arith --model m", "--model is for a server"),
        ("arith --api-key k", "--api-key is for a server"),
        ("arith --base-url http://127.0.0.1:9 folder", "MODEL is for an engine"),
        ("arith --base-url http://127.0.0.1:9 --dtype float32", "--dtype is for an engine"),
        ("arith --base-url 127.0.0.1:9", "--base-url"),
        ("arith --base-url http://127.0.0.1:9 --seed 3", "connection refused"),
        ("arith --request-timeout 0", "--request-timeout"),
        ("arith --output-json no/such/f.json", "--output-json"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], line: str, words: str) -> None:
    assert main(["eval", *line.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


def test_a_server_that_never_answers_gives_figures_and_exit_code_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "f.json"
    options = ["--base-url", "http://127.0.0.1:9", "--model", "m", "--max-retries", "0", "--num-questions", "3"]
    assert main(["eval", "arith", *options, "--output-json", str(file)]) == 1
    out = capsys.readouterr().out
    assert "Accuracy: 0.000\n" in out
    assert "Errors: 3, counted as invalid\n" in out
    assert "failed: 3 x 127.0.0.1:9 cannot be reached: connection refused\n" in out
    [row] = json.loads(file.read_text())["results"]
    assert (row["errors"], len(row["answers"])) == (3, 3)
