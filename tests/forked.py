"""Processes forked from one that has imported torch and the engine, which takes longer than most tests of theirs."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "thalweg.assembly.rank"])


class ForkedRank:
    """In place of a Popen of rank_main: as far as `LocalRanks` uses one."""

    def __init__(self, command: list[str], **_: Any) -> None:
        theirs, ours = CONTEXT.Pipe(duplex=False)
        self._process = CONTEXT.Process(target=_run, args=(command[2:], theirs, dict(os.environ)))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.stdin = os.fdopen(os.dup(ours.fileno()), "wb", buffering=0)
        self._ended = threading.Event()
        threading.Thread(target=self._join, daemon=True).start()

    def _join(self) -> None:
        self._process.join()
        self._ended.set()

    def poll(self) -> int | None:
        return self._process.exitcode if self._ended.is_set() else None

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired("a rank", timeout or 0)
        assert self._process.exitcode is not None
        return self._process.exitcode


def _run(command: list[str], stdin: Connection, environment: dict[str, str]) -> None:
    os.setsid()
    os.dup2(stdin.fileno(), 0)
    os.environ.clear()  # of what tests had set when the first of these processes was made
    os.environ.update(environment)
    module, *sys.argv[1:] = command
    runpy.run_module(module, run_name="__main__")
