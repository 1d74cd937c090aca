"""Profiles of an engine that serves, on demand: windows that all ranks record, joined by a process beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from thalweg.core import Request, RequestUpdate
from thalweg.engine.processes import messages as m
from thalweg.engine.recording import Limits, Recording
from thalweg.errors import InvalidRequest, ProfileConflict, ThalwegError
from thalweg.recorder.join import TASK_FILE, JoinTask
from thalweg.recorder.orders import Recorded
from thalweg.recorder.requests import RequestTimes

WRITE_SECONDS = 90.0  # for the ranks to write their traces, and again to join them
MAX_TRACES = 100  # in the folder; a client that starts and stops for ever does not fill the disk
MAX_REQUESTS = 10_000  # that ended within one window; later ones are left out of its trace


class Profiler:
    """Answers StartProfile and StopProfile through `send`. `take` and `poll` return at once; only orders wait their
    turn behind steps. Nothing that goes wrong here ends the engine.
    """

    def __init__(self, recording: Recording, options: m.ProfilerOptions, send: Callable[[m.Profiled], object]) -> None:
        self._recording, self._options, self._send = recording, options, send
        self._folder: Path | None = None  # of the window under way, until its trace is written
        self._asked: list[int] = []  # who waits for it
        self._unclaimed: m.Trace | ThalwegError | None = None  # of a window that was full before anybody stopped it
        self._deadline = 0.0
        self._joining: subprocess.Popen[bytes] | None = None
        self._output = Path()
        self._count = 0
        self._live: dict[str, RequestTimes] = {}
        self._ended: list[RequestTimes] = []
        recording.warm_up()

    @property
    def writing(self) -> bool:
        """Whether a window is closed and its trace not yet there; `poll` should be called soon."""
        return self._folder is not None and self._recording.closed

    def take(self, message: m.StartProfile | m.StopProfile) -> None:
        try:
            if isinstance(message, m.StartProfile):
                self._start(message.num_steps)
                self._send(m.Profiled(message.id))
            else:
                self._stop(message.id)
        except ThalwegError as e:
            self._send(m.Profiled(message.id, None, type(e).__name__, str(e)))

    def poll(self) -> None:
        """Take the writing of a closed window one step on."""
        if self._folder is None or not self._recording.closed:
            return
        try:
            self._advance(self._folder)
        except ThalwegError as e:
            self._finish(e)
        except Exception as e:  # noqa: BLE001 -- of torch's profiler, which is no reason to end the engine
            self._finish(ThalwegError(f"the trace was not written: {type(e).__name__}: {e}"))

    def added(self, request: Request) -> None:
        self._live[request.id] = RequestTimes(request.id, len(request.prompt_token_ids), time.perf_counter_ns())

    def updated(self, updates: Iterable[RequestUpdate]) -> None:
        now = time.perf_counter_ns()
        for update in updates:
            times = self._live.get(update.request_id)
            if times is not None and update.token_ids and not times.first_token_ns:
                times.first_token_ns = now
            if update.finish_reason is not None:
                self.ended(update.request_id)

    def ended(self, request_id: str) -> None:
        times = self._live.pop(request_id, None)
        if times is not None and self._folder is not None and len(self._ended) < MAX_REQUESTS:
            times.ended_ns = time.perf_counter_ns()
            self._ended.append(times)

    def close(self) -> None:
        """Give up what is under way."""
        if self._joining is not None:
            self._joining.kill()
            self._joining.wait()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, num_steps: int | None) -> None:
        if self._folder is not None:
            raise ProfileConflict("a profile is under way already; stop it with POST /stop_profile")
        most = self._options.max_steps
        if num_steps is not None and not 1 <= num_steps <= most:
            raise InvalidRequest(f"num_steps is {num_steps}; expected 1 to {most} (--profiler-max-steps)")
        parent = Path(self._options.folder)
        if sum(1 for _ in parent.glob("trace-*.json.gz")) >= MAX_TRACES:
            raise ProfileConflict(f"the server's folder for profiles has {MAX_TRACES} traces; remove some of them")
        try:
            self._folder = Path(tempfile.mkdtemp(prefix=".recording-", dir=parent))
        except OSError as e:
            raise ThalwegError(f"the server's folder for profiles cannot be written: {e.strerror}") from None
        self._unclaimed, self._ended, self._deadline = None, [], 0.0
        self._recording.start(self._folder, Limits(num_steps or most, self._options.max_bytes))

    def _stop(self, request_id: int) -> None:
        if self._folder is not None:
            self._asked.append(request_id)
            self._recording.stop()
        elif self._unclaimed is not None:
            self._asked.append(request_id)
            self._answer(self._unclaimed)
        else:
            raise ProfileConflict("no profile is under way; start one with POST /start_profile")

    def _advance(self, folder: Path) -> None:
        now = time.monotonic()
        self._deadline = self._deadline or now + WRITE_SECONDS
        if self._joining is None:
            recorded = self._recording.result()
            if recorded is None:
                if now > self._deadline:
                    missing = ", ".join(map(str, self._recording.missing()))
                    raise ThalwegError(f"the trace of rank {missing} was not written within {WRITE_SECONDS:g} s")
            elif not recorded.began_ns:
                self._finish(self._trace(None))
            else:
                self._join(folder, recorded)
                self._deadline = now + WRITE_SECONDS
        elif (code := self._joining.poll()) is not None:
            self._joining = None
            if code:
                said = (folder / "join.log").read_text(errors="replace").strip().splitlines() or [f"exit code {code}"]
                raise ThalwegError(f"the trace was not written: {said[-1]}")
            self._finish(self._trace(self._output))
        elif now > self._deadline:
            self._joining.kill()
            self._joining.wait()
            self._joining = None
            raise ThalwegError(f"the ranks' traces were not joined within {WRITE_SECONDS:g} s")

    def _join(self, folder: Path, recorded: Recorded) -> None:
        task = JoinTask(self._recording.ranks, recorded, [*self._ended, *self._live.values()])
        (folder / TASK_FILE).write_bytes(msgspec.json.encode(task))
        self._count += 1
        name = f"trace-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{self._count}.json.gz"
        self._output = Path(self._options.folder) / name
        command = [sys.executable, "-m", "thalweg.recorder.join", str(folder), str(self._output)]
        with (folder / "join.log").open("wb") as log:
            self._joining = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _trace(self, file: Path | None) -> m.Trace:
        return m.Trace(
            file=None if file is None else str(file),
            bytes=0 if file is None else file.stat().st_size,
            steps=len(self._recording.rows),
            ranks=self._recording.ranks,
            full_of=self._recording.full_of,
        )

    def _finish(self, outcome: m.Trace | ThalwegError) -> None:
        assert self._folder is not None
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder, self._ended = None, []
        self._answer(outcome)

    def _answer(self, outcome: m.Trace | ThalwegError) -> None:
        """Tell those who asked; if nobody did, keep it for who will."""
        self._unclaimed = None if self._asked else outcome
        asked, self._asked = self._asked, []
        for request_id in asked:
            if isinstance(outcome, m.Trace):
                self._send(m.Profiled(request_id, outcome))
            else:
                self._send(m.Profiled(request_id, None, type(outcome).__name__, str(outcome)))
