"""Standard streams that are closed, full, or left by their reader: one line, a code other than 0, no traceback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from thalweg.cli import main

DUMMY = ["--load-format", "dummy", "--device", "cpu", "--cache-memory", "64MiB"]
COMMANDS = [
    ["--help"],
    ["--version"],
    ["bench", "latency", "--help"],
    ["inspect"],
    ["inspect", "--json"],
    ["generate", *DUMMY, "--prompt", "x", "--max-tokens", "4"],
    ["generate", *DUMMY, "--prompt", "x", "--max-tokens", "4", "--json"],
    ["eval", "arith", *DUMMY, "--num-questions", "1", "--max-new-tokens", "1"],
    ["bench", "host", "--num-seqs", "1", "--steps", "1", "--finished", "0"],
]
SHELL = [sys.executable, "-c", "from thalweg.cli import main; raise SystemExit(main())"]


def complaint(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lines on stderr but for figures."""
    return [line for line in capsys.readouterr().err.splitlines() if "tokens/s" not in line]


@pytest.mark.parametrize("args", COMMANDS, ids=" ".join)
def test_closed_and_full(args: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(args) == 2
    assert complaint(capsys) == ["error: the output cannot be written: standard output is closed"]
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(args) == 2
        assert complaint(capsys) == ["error: the output cannot be written: No space left on device"]


@pytest.mark.parametrize("args", COMMANDS, ids=" ".join)
def test_a_reader_that_has_gone_is_no_error_to_tell(
    args: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(args) == 1
        assert complaint(capsys) == []
        monkeypatch.undo()


def test_figures_are_written_to_a_file_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "stdout", None)
    assert main([*COMMANDS[-1], "--output-json", str(path)]) == 2
    assert json.loads(path.read_text())["results"]


@pytest.mark.parametrize(
    ("shell", "code", "error"),
    [
        ('exec "$@" >&-', 2, "error: the output cannot be written: standard output is closed\n"),
        ('exec "$@" >/dev/full', 2, "error: the output cannot be written: No space left on device\n"),
        ('exec "$@" <&- >&- 2>&-', 2, ""),
        ('"$@" | true; exit ${PIPESTATUS[0]}', 1, ""),
    ],
)
def test_from_a_shell(shell: str, code: int, error: str) -> None:
    done = subprocess.run(["bash", "-c", shell, "-", *SHELL, "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, error)


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free: int = listener.getsockname()[1]
    return free


@pytest.mark.parametrize("streams", [">&-", "<&- >/dev/full 2>/dev/full"])
def test_a_server_runs_without_anybody_to_tell(streams: str, port: int) -> None:
    args = [*SHELL, "serve", *DUMMY, "--max-num-seqs", "2", "--port", str(port)]
    server = subprocess.Popen(
        ["bash", "-c", f'exec "$@" {streams}', "-", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while server.poll() is None and time.monotonic() < deadline:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        ask = {"model": "thalweg-tiny", "prompt": "x", "max_tokens": 2, "ignore_eos": True}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=ask, timeout=60).json()
        assert answer["usage"]["completion_tokens"] == 2
        server.send_signal(signal.SIGTERM)
        out, err = server.communicate(timeout=60)
        assert (server.returncode, out) == (0, "")
        assert "Traceback" not in err
    finally:
        server.kill()
        server.communicate()
