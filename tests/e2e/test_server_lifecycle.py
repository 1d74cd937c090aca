"""Whichever process dies: requests are told, the others end by themselves, and no temporary folder stays."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.dist.processes import lives, needs_proc, until
from tests.e2e.tiny_model import CONTEXT, command_line_server
from thalweg.engine.processes.ipc import PREFIX, remove_stale

pytestmark = needs_proc

LONG = {"prompt": "a", "max_tokens": CONTEXT - 2, "ignore_eos": True, "stream": True, "n": 16}
KILLED = -signal.SIGKILL
ENGINE_DIED = 3


def socket_folders(tmp: Path) -> list[Path]:
    return list(tmp.glob(PREFIX + "*"))


def gauge(text: str, name: str) -> float:
    [line] = [line for line in text.splitlines() if line.startswith(f"thalweg_{name} ")]
    return float(line.split()[1])


def test_a_dead_engine_ends_its_requests_and_then_the_server(folder: Path, tmp: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        command_line_server(log, str(folder), "--max-num-seqs", "4", code=ENGINE_DIED, tmp=tmp) as server,
        httpx.Client(base_url=server.url, timeout=20) as http,
        ThreadPoolExecutor(6) as pool,
    ):

        def last_event(_: int) -> str:
            with http.stream("POST", "/v1/completions", json=LONG) as response:
                return [line for line in response.iter_lines() if line][-1]

        streams = [pool.submit(last_event, i) for i in range(4)]
        whole = pool.submit(http.post, "/v1/completions", json={**LONG, "stream": False})
        until(lambda: gauge(http.get("/metrics").text, "num_requests_waiting") == 5 * 16 - 4, "they do not wait")
        os.kill(server.engine_pid(), signal.SIGKILL)
        for stream in streams:
            assert "exit code -9" in stream.result()
            assert '"engine_dead"' in stream.result()
        assert whole.result().status_code == 503
        health = http.get("/health")
        assert (health.status_code, health.json()["error"]["code"]) == (503, "engine_dead")
        assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 503
        metrics = http.get("/metrics").text
        for name in ("num_requests_running", "num_requests_waiting", "state_slots_used", "kv_cache_usage_perc"):
            assert gauge(metrics, name) == 0
        assert gauge(metrics, "generation_tokens_total") > 0  # counters do not go back
        began = time.monotonic()
        server.process.wait(20)
        assert time.monotonic() - began < 10
    assert log.read_text().splitlines()[-1] == "error: the engine process ended with exit code -9"
    assert "Traceback" not in log.read_text()
    assert not socket_folders(tmp)


def test_a_client_that_does_not_read_does_not_keep_a_server_without_an_engine(
    folder: Path, tmp: Path, tmp_path: Path
) -> None:
    with (
        command_line_server(tmp_path / "log", str(folder), code=ENGINE_DIED, tmp=tmp) as server,
        httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=30) as response,
    ):
        lines = response.iter_lines()  # whose end would be the connection's
        next(lines)
        os.kill(server.engine_pid(), signal.SIGKILL)
        server.process.wait(20)


def test_a_killed_server_takes_its_engine_and_folder_along(folder: Path, tmp: Path, tmp_path: Path) -> None:
    with command_line_server(tmp_path / "log", str(folder), code=KILLED, tmp=tmp) as server:
        engine = server.engine_pid()
        assert len(socket_folders(tmp)) == 1
        server.process.kill()
        until(lambda: not lives(engine), "the engine lives on")
        assert not socket_folders(tmp)


def test_what_both_leave_the_next_start_removes(folder: Path, tmp: Path, tmp_path: Path) -> None:
    with command_line_server(tmp_path / "log", str(folder), code=KILLED, tmp=tmp) as server:
        engine = server.engine_pid()
        remove_stale(tmp)
        assert len(socket_folders(tmp)) == 1  # in use
        os.kill(engine, signal.SIGSTOP)  # so that it cannot see the other one's death
        server.process.kill()
        os.kill(engine, signal.SIGKILL)
        until(lambda: not lives(engine), "the engine lives on")
        server.process.wait(20)  # the lock is free once the process is gone, which takes longer than the signal
        assert len(socket_folders(tmp)) == 1
        remove_stale(tmp)
        assert not socket_folders(tmp)
