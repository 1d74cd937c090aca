"""The HTTP server on real sockets: heads, lengths, idle connections, streams that wait, ids in the log."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.e2e.test_server_limits import raw
from tests.e2e.tiny_model import CONTEXT, ServerProcess, server_process, write_tiny_model
from thalweg.server.settings import MAX_HEADER_BYTES

LONG = {"prompt": "a", "max_tokens": CONTEXT - 2, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    log = tmp_path_factory.mktemp("server") / "log"
    options = {"keep_alive_timeout": 1, "sse_ping_interval": 0.2, "log_level": "info"}
    with server_process(log, {"model": str(folder), "max_num_seqs": 1}, options) as running:
        yield running


def answers(client: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    data = b""
    while piece := client.recv(65_536):
        data += piece
    return data


def test_a_second_request_hidden_in_a_body_is_not_answered(server: ServerProcess) -> None:
    hidden = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
    head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    for lengths in (b"Content-Length: 5\r\nTransfer-Encoding: chunked", b"Content-Length: 5\r\nContent-Length: 5"):
        with raw(server) as client:
            client.sendall(head + lengths + b"\r\n\r\n0\r\n\r\n" + hidden)
            data = answers(client)
        assert data.startswith(b"HTTP/1.1 400")
        assert data.count(b"HTTP/1.1 ") == 1
        assert json.loads(data.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


def test_the_limit_of_heads_is_exact(server: ServerProcess) -> None:
    begin = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX: "
    for size, status in ((MAX_HEADER_BYTES, b"200"), (MAX_HEADER_BYTES + 1, b"431")):
        with raw(server) as client:
            client.sendall(begin + b"a" * (size - len(begin) - 4) + b"\r\n\r\n")
            assert answers(client).startswith(b"HTTP/1.1 " + status)


def test_malformed_chunks_end_the_connection_and_nothing_else(server: ServerProcess) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    with raw(server) as client:
        client.sendall(head + b"3\r\nabcXX0\r\n\r\n")
        assert answers(client).startswith(b"HTTP/1.1 400")
    with raw(server) as client:  # of a request that was answered before its end
        client.sendall(head.replace(b"tokenize", b"nowhere") + b"1\r\n{\r\n")
        assert client.recv(65_536).startswith(b"HTTP/1.1 404")
        client.sendall(b"zz\r\n")
        assert b"HTTP/1.1" not in answers(client)
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_head_of_health(server: ServerProcess) -> None:
    with raw(server) as client:
        client.sendall(
            b"HEAD /health HTTP/1.1\r\nHost: x\r\n\r\nGET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        )
        data = answers(client)
    assert data.startswith(b"HTTP/1.1 200")
    assert data.partition(b"\r\n\r\n")[2].startswith(b"HTTP/1.1 200")  # no body between the two


def test_an_idle_connection_is_kept_as_long_as_it_says(server: ServerProcess) -> None:
    request = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with raw(server) as client:
        for _ in range(3):
            client.sendall(request)
            answer = b""
            while b'"ok"' not in answer:
                answer += client.recv(65_536)
            assert answer.startswith(b"HTTP/1.1 200")
            time.sleep(0.5)
        began = time.monotonic()
        assert client.recv(65_536) == b""
        assert time.monotonic() - began < 3


def test_a_stream_that_waits_for_its_slot_has_its_head_at_once_and_comments(server: ServerProcess) -> None:
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**LONG, "n": 4}, timeout=30) as first:
        running = first.iter_lines()  # which ends the stream once nobody refers to it
        next(running)
        began = time.monotonic()
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=30) as second:
            assert second.status_code == 200
            head_after = time.monotonic() - began
            lines = [line for line in second.iter_lines() if line]
    assert head_after < 0.5
    assert lines[-1] == "data: [DONE]"
    assert lines[0] == ": keep-alive"


def test_clients_pass_over_comments(server: ServerProcess) -> None:
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30) as client,
        httpx.stream("POST", f"{server.url}/v1/completions", json={**LONG, "n": 4}, timeout=30) as first,
    ):
        running = first.iter_lines()  # which ends the stream once nobody refers to it
        next(running)
        chunks = list(client.completions.create(model="tiny", prompt="a", max_tokens=3, stream=True))
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")


def test_ids_are_in_the_access_log(server: ServerProcess) -> None:
    httpx.get(f"{server.url}/health", headers={"x-request-id": "find-me"})
    httpx.get(f"{server.url}/nowhere", headers={"x-request-id": "me-too"})
    assert server.process.stdout is not None
    lines = []
    while not lines or "me-too" not in lines[-1]:
        lines.append(server.process.stdout.readline())
    assert lines[-2].strip().endswith('"GET /health HTTP/1.1" 200 OK find-me')
    assert lines[-1].strip().endswith('"GET /nowhere HTTP/1.1" 404 Not Found me-too')


def test_the_log_has_no_traceback(server: ServerProcess) -> None:
    assert "Traceback" not in server.errors()
