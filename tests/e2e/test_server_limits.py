"""Limits of the HTTP server with a real engine and real sockets: who is kept waiting, and for how long."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.test_server import metric, wait_until_idle
from tests.e2e.tiny_model import CONTEXT, ServerProcess, server_process
from thalweg.server.connections import listen
from thalweg.server.protocol import PromptProtocol

LIMITS = {"max_num_seqs": 2, "max_num_batched_tokens": 128, "block_size": 16}
LONG = {"prompt": "a", "max_tokens": CONTEXT, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "log"
    limits = {"max_queued_requests": 2, "queue_timeout": 30.0, "request_timeout": 30.0}
    with server_process(log, {"model": str(folder), **LIMITS}, limits) as running:
        yield running


def raw(server: ServerProcess) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def test_more_than_the_queue_holds_is_429_and_what_was_taken_ends_well(server: ServerProcess) -> None:
    with ThreadPoolExecutor(12) as pool, httpx.Client(base_url=server.url, timeout=60) as http:
        body = {**LONG, "max_tokens": 200}
        answers = list(pool.map(lambda _: http.post("/v1/completions", json=body), range(12)))
    taken = [a.json() for a in answers if a.status_code == 200]
    refused = [a for a in answers if a.status_code == 429]
    assert len(taken) >= 4
    assert len(refused) >= 1
    assert len(taken) + len(refused) == 12
    assert all(a.headers["retry-after"] for a in refused)
    assert {a["usage"]["completion_tokens"] for a in taken} == {200}
    wait_until_idle(server)


def test_a_connection_that_breaks_off_within_its_body_or_head_leaves_nothing(server: ServerProcess) -> None:
    body = json.dumps(LONG).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    for sent in (b"", b"POST /v1", head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body[:9])):
        with raw(server) as client:
            client.sendall(sent)
    # Two requests at once on a connection that then goes.
    whole = head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    with raw(server) as client:
        client.sendall(whole + whole)
        time.sleep(0.2)
    wait_until_idle(server)
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 50_000 + b"\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_request_is_400_and_the_end_of_the_connection(server: ServerProcess, sent: bytes) -> None:
    with raw(server) as client:
        answer = b""
        try:
            client.sendall(sent)
            while piece := client.recv(65_536):
                answer += piece
        except ConnectionError:
            pass  # the server need not read to the end of it
    assert not answer or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_client_that_reads_slowly_loses_nothing(server: ServerProcess) -> None:
    [expected] = httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=30).json()["choices"]
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**LONG, "stream": True}, timeout=30) as response:
        text = ""
        for i, line in enumerate(response.iter_lines()):
            if i < 40:
                time.sleep(0.01)
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
    assert text == expected["text"]
    wait_until_idle(server)


def test_every_refusal_left_the_log_without_a_traceback(server: ServerProcess) -> None:
    assert "Traceback" not in server.errors()


def test_a_signal_ends_what_does_not_finish_in_time_with_an_error(folder: Path, tmp_path: Path) -> None:
    limits = {"shutdown_timeout": 0.3}
    with (
        server_process(tmp_path / "log", {"model": str(folder), "max_num_seqs": 1}, limits) as server,
        ThreadPoolExecutor(2) as pool,
        httpx.Client(base_url=server.url, timeout=20) as http,
    ):
        # 16 sequences one after another take longer than that.
        with http.stream("POST", "/v1/completions", json={**LONG, "n": 16, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            waiting = pool.submit(http.post, "/v1/completions", json={**LONG, "n": 16})
            while metric(server, "num_requests_waiting") < 16:
                time.sleep(0.01)
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-1]
        assert "the server shuts down" in last
        assert waiting.result().status_code == 503
        assert server.process.wait(20) == 0
        assert time.monotonic() - began < 5
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_requests_that_wait_get_their_turn_after_a_signal(folder: Path, tmp_path: Path) -> None:
    body = {**LONG, "max_tokens": 150}
    with (
        server_process(tmp_path / "log", {"model": str(folder), "max_num_seqs": 1}) as server,
        ThreadPoolExecutor(4) as pool,
        httpx.Client(base_url=server.url, timeout=20) as http,
    ):
        asked = [pool.submit(http.post, "/v1/completions", json=body) for _ in range(4)]
        while not metric(server, "num_requests_waiting"):
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        assert [a.result().json()["usage"]["completion_tokens"] for a in asked] == [150] * 4
        assert server.process.wait(20) == 0


# Connections without a server behind them, so that waiting takes a second and not a minute.


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux closes them; others wait")
@pytest.mark.slow
def test_a_client_that_reads_nothing_is_cut_off() -> None:
    with (
        listen("127.0.0.1", 0, stalled_seconds=1) as listener,
        socket.create_connection(listener.getsockname()) as idle,
    ):
        assert idle.fileno() > 0  # and never reads
        accepted, _ = listener.accept()
        failed: list[OSError] = []

        def write() -> None:
            try:
                while True:
                    accepted.sendall(b"x" * 65_536)
            except OSError as e:
                failed.append(e)

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(20)
        assert failed
        accepted.close()


def test_a_connection_without_a_request_is_closed(monkeypatch: Any) -> None:
    import asyncio

    import uvicorn

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.5)  # longer than a head may take
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    monkeypatch.setattr(PromptProtocol, "header_seconds", 0.2)
    request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"

    async def ask(port: int, *pieces: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.05)
        data = await asyncio.wait_for(reader.read(), 5)
        writer.close()
        return data

    async def main() -> list[bytes]:
        with listen("127.0.0.1", 0) as listener:
            server = uvicorn.Server(
                uvicorn.Config(app, http=PromptProtocol, lifespan="off", timeout_keep_alive=1, log_level="error")
            )
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            port = listener.getsockname()[1]
            got = await asyncio.gather(
                ask(port), ask(port, request[:9]), ask(port, request), ask(port, request, request[:9])
            )
            server.should_exit = True
            await serving
        return got

    nothing, half, one, one_and_half = asyncio.run(main())
    assert (nothing, half) == (b"", b"")
    assert one.endswith(b"ok")
    assert one_and_half.endswith(b"ok")
