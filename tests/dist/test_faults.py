"""kill -9 of any process at any point: requests end with an error that says why, everything ends, nothing is left."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.dist.processes import Server, children, command, lives, maps, needs_proc, serving, shared_memory, stop, until
from tests.e2e.tiny_model import CONTEXT

pytestmark = needs_proc

WITHIN = 10.0  # seconds from a death to the end of all
KILLED, ENGINE_DIED = -signal.SIGKILL, 3
EXPECTED = {
    "engine": r"engine process (of data-parallel rank \d )?ended (with exit code -9|before it was ready)",
    "rank": "rank . ended with exit code -9",
}
DATA_PARALLEL = ("--data-parallel-size", "2", "--enable-expert-parallel")
PROMPT = {"prompt": "a", "max_tokens": CONTEXT - 2, "ignore_eos": True, "stream": True}


def started(server: Server, victim: str) -> None:
    until(lambda: server.pid(victim), "it does not start")


def bound(server: Server, victim: str) -> None:
    """The engine has its socket and starts its ranks; a rank has its own, and is told its part."""
    name = victim.replace(" ", "-")
    until(lambda: (found := server.socket_folder()) and (found / name).exists(), "no socket")


def meeting(server: Server, victim: str) -> None:
    """A rank looks for the others."""
    until(lambda: (found := server.socket_folder()) and any(found.glob("*rendezvous*")), "nobody wants to meet")


def loading(server: Server, victim: str) -> None:
    """The weights' file is open, before or after the ranks have met."""
    until(lambda: (pid := server.pid(victim)) and maps(pid, "model.safetensors"), "the weights are not opened")


# The server maps no weights; when it has an engine that does, it is where it waits for the engine to be ready.
STARTING: dict[str, Callable[[Server, str], None]] = {
    "started": started,
    "bound": bound,
    "meeting": meeting,
    "loading": loading,
}


def stopped_at(server: Server, point: str, victim: str) -> int:
    """The victim's id, who does nothing from `point` on, so that the others come to where they wait for it."""
    STARTING[point](server, "engine" if victim == "server" and point != "started" else victim)
    pid = server.pid(victim)
    assert pid
    stop(pid)
    return pid


def check_error(server: Server, victim: str, code: int) -> None:
    log = server.log.read_text()
    assert "Traceback" not in log, log
    if victim == "server":
        assert code == KILLED
        return
    assert code == ENGINE_DIED, log
    last = log.splitlines()[-1]
    assert last.startswith("error: "), log
    assert re.search(EXPECTED[victim.split()[0]], last), log
    if " " in victim:
        assert victim.replace("engine", "rank") in last, log


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


def exhaustive(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize(
    ("point", "victim"),
    [
        ("loading", "rank 1"),
        exhaustive("loading", "engine"),
        exhaustive("started", "rank 1"),
        exhaustive("bound", "rank 1"),
        exhaustive("meeting", "rank 1"),
        exhaustive("started", "engine"),
        exhaustive("bound", "engine"),
        exhaustive("meeting", "engine"),
        exhaustive("bound", "server"),
        exhaustive("meeting", "server"),
        exhaustive("loading", "server"),
    ],
)
def test_a_death_at_the_start(folder: Path, tmp: Path, tmp_path: Path, point: str, victim: str) -> None:
    before = shared_memory()
    with serving(tmp_path / "log", tmp, str(folder), "-tp", "2") as server:
        pid = stopped_at(server, point, victim)
        for name in ("engine", "rank 1"):
            server.pid(name)  # whoever is there has to go
        os.kill(pid, signal.SIGKILL)
        check_error(server, victim, server.check_gone(WITHIN))
    assert shared_memory() <= before


@pytest.mark.parametrize(
    ("point", "victim"),
    [
        ("prefill", "rank 1"),
        exhaustive("prefill", "engine"),
        exhaustive("decode", "rank 1"),
        slow("decode", "engine"),
        exhaustive("decode", "server"),
        exhaustive("idle", "rank 1"),
    ],
)
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_a_death_while_requests_run(
    folder: Path, tmp: Path, tmp_path: Path, point: str, victim: str, size: int
) -> None:
    if size > 2 and victim.startswith("rank"):
        victim = f"rank {size - 1}"
    with serving(tmp_path / "log", tmp, str(folder), "-tp", str(size), "--sse-ping-interval", "0.1") as server:
        check_death(server, point, victim, server.url(), server.all_of(size)[victim])


def check_death(server: Server, point: str, victim: str, url: str, pid: int) -> None:
    before = shared_memory()
    with ThreadPoolExecutor(2) as pool:
        if point == "prefill":
            stop(pid)  # the others come as far as they do without it
        if point == "idle":
            os.kill(pid, signal.SIGKILL)
            check_error(server, victim, server.check_gone(WITHIN))
            return
        tokens: list[str] = []
        died = 0.0

        def stream() -> tuple[str, float]:
            """The last thing that a client hears, and when."""
            with httpx.stream("POST", f"{url}/v1/completions", json=PROMPT, timeout=60) as response:
                tokens.append("")  # the request is taken
                last = ""
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        last = line
                        tokens.append(line)
            return last, time.monotonic()

        answers = [pool.submit(stream) for _ in range(2)]
        until(lambda: len(tokens) > (1 if point == "prefill" else 10), "nothing runs")
        os.kill(pid, signal.SIGKILL)
        died = time.monotonic()
        for answer in answers:
            if victim == "server":
                assert isinstance(answer.exception(WITHIN), httpx.HTTPError)
                continue
            last, ended = answer.result(WITHIN)
            assert '"engine_dead"' in last
            assert ended - died < WITHIN
        if victim != "server":
            health = httpx.get(f"{url}/health")
            assert (health.status_code, health.json()["error"]["code"]) == (503, "engine_dead")
        check_error(server, victim, server.check_gone(WITHIN))
    assert shared_memory() <= before


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("point", "victim"),
    [
        ("started", "engine 1"),
        ("bound", "engine 1"),
        ("meeting", "engine"),
        ("meeting", "engine 1"),
        ("loading", "engine"),
        ("loading", "engine 1"),
        ("loading", "server"),
    ],
)
def test_a_death_at_the_start_of_data_parallel_ranks(
    folder: Path, tmp: Path, tmp_path: Path, point: str, victim: str
) -> None:
    with serving(tmp_path / "log", tmp, str(folder), *DATA_PARALLEL) as server:
        pid = stopped_at(server, point, victim)
        for name in ("engine", "engine 1"):
            server.pid(name)
        os.kill(pid, signal.SIGKILL)
        check_error(server, victim, server.check_gone(WITHIN))


@pytest.mark.slow
def test_a_death_at_the_start_is_not_waited_with_for_a_data_parallel_rank_that_hangs(
    folder: Path, tmp: Path, tmp_path: Path
) -> None:
    with serving(tmp_path / "log", tmp, str(folder), *DATA_PARALLEL) as server:
        stopped_at(server, "bound", "engine")
        pid = server.all_of(2, "engine")["engine 1"]
        os.kill(pid, signal.SIGKILL)
        check_error(server, "engine 1", server.check_gone(WITHIN))


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("point", "victim"),
    [
        ("prefill", "engine"),
        ("prefill", "engine 1"),
        ("decode", "engine"),
        ("decode", "engine 1"),
        ("decode", "server"),
        ("idle", "engine 1"),
    ],
)
def test_a_death_while_data_parallel_ranks_have_requests(
    folder: Path, tmp: Path, tmp_path: Path, point: str, victim: str
) -> None:
    with serving(tmp_path / "log", tmp, str(folder), *DATA_PARALLEL, "--sse-ping-interval", "0.1") as server:
        check_death(server, point, victim, server.url(), server.all_of(2, "engine")[victim])


@pytest.mark.parametrize(
    ("point", "victim"),
    [
        ("decode", "rank 1"),
        ("decode", "engine 1"),
        exhaustive("idle", "rank 1"),
        exhaustive("prefill", "rank 1"),
        exhaustive("prefill", "engine 1"),
    ],
)
@pytest.mark.slow
def test_a_death_of_a_rank_that_shares_a_data_parallel_one_s_model(
    folder: Path, tmp: Path, tmp_path: Path, point: str, victim: str
) -> None:
    """The others' ranks lose one that shares the model of none of them, and leave it to others to say so."""
    options = (*DATA_PARALLEL, "-tp", "2", "--sse-ping-interval", "0.1")
    with serving(tmp_path / "log", tmp, str(folder), *options) as server:
        url = server.url()
        pid = (server.all_of(2) | server.all_of(2, "engine"))[victim]
        check_death(server, point, victim, url, pid)
        if victim == "rank 1":
            assert "tensor-parallel rank 1 of data-parallel rank 0 ended" in server.log.read_text()


@pytest.mark.slow
def test_a_rank_that_hangs_and_shares_a_data_parallel_one_s_model_is_ended(
    folder: Path, tmp: Path, tmp_path: Path
) -> None:
    """Its engine is told to leave at once, and does not leave it behind."""
    with serving(tmp_path / "log", tmp, str(folder), *DATA_PARALLEL, "-tp", "2", "--step-timeout", "2") as server:
        url = server.url()
        pid = (server.all_of(2) | server.all_of(2, "engine"))["rank 1"]
        stop(pid)
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 4}, timeout=60)
        assert '"engine_dead"' in answer.text
        assert server.check_gone(WITHIN) == ENGINE_DIED


@pytest.mark.parametrize("victim", ["engine", exhaustive("server")])
@pytest.mark.slow
def test_a_death_while_a_rank_hangs_leaves_it_no_longer(folder: Path, tmp: Path, tmp_path: Path, victim: str) -> None:
    with serving(tmp_path / "log", tmp, str(folder), "-tp", "2") as server:
        server.url()
        processes = server.all_of(2)
        stop(processes["rank 1"])
        os.kill(processes[victim], signal.SIGKILL)
        check_error(server, victim, server.check_gone(WITHIN))


@pytest.mark.slow
def test_a_death_while_kernels_are_compiled(folder: Path, tmp: Path, tmp_path: Path) -> None:
    """The compiler ends too, and the next start does not wait for it."""
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho $$ >> " + str(tmp_path / "pids") + "\nexec sleep 600\n")
    compiler.chmod(0o755)
    cache = {"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    with serving(tmp_path / "log", tmp, str(folder), "-tp", "2", **cache) as server:
        until(lambda: (tmp_path / "pids").exists(), "nothing is compiled")
        processes = server.all_of(2)
        compiling = next(n for n, pid in processes.items() if any("sleep" in command(c) for c in children(pid)))
        os.kill(processes[compiling], signal.SIGKILL)
        check_error(server, compiling, server.check_gone(WITHIN))
    compilers = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    until(lambda: not any(map(lives, compilers)), "a compiler lives on", WITHIN)
