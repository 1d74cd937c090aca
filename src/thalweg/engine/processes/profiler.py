"""Profiles of engines that serve, on demand: windows that all ranks record, joined by a process beside them."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from thalweg.core import Request, RequestUpdate
from thalweg.errors import EngineDeadError, InvalidRequest, ProfileConflict, ThalwegError
from thalweg.recorder.join import TASK_FILE, JoinTask
from thalweg.recorder.orders import (
    Order,
    StartRecording,
    StopRecording,
    full_file,
    missing,
    read_recorded,
    rows_of_all,
)
from thalweg.recorder.requests import RequestTimes

WRITE_SECONDS = 90.0  # for the ranks to write their traces, and again to join them
POLL_SECONDS = 0.02
MAX_TRACES = 100  # in the folder; a client that starts and stops for ever does not fill the disk
MAX_REQUESTS = 10_000  # that ended within one window; later ones are left out of its trace


@dataclass(frozen=True, slots=True)
class ProfilerOptions:
    """Where traces go, and the steps of one at most. A trace ends early once an engine process has allocated
    `max_bytes` more."""

    folder: str
    max_steps: int
    max_bytes: int


class Trace(msgspec.Struct, frozen=True):
    """What a profile recorded: its file of so many bytes (None if no step came), and the steps and ranks in it.
    `full_of` is "steps" or "bytes" if that limit ended it."""

    file: str | None
    bytes: int
    steps: int
    ranks: int
    full_of: str | None


class Profiler:
    """One window at a time, for one asyncio loop. `order` has all ranks of all engines do something together (see
    Engines.order); of `ranks` in all, each engine has `share`."""

    def __init__(
        self, order: Callable[[Order], Awaitable[Any]], options: ProfilerOptions, ranks: int = 1, share: int = 1
    ) -> None:
        self._order, self._options, self._ranks, self._share = order, options, ranks, share
        self._window: asyncio.Task[Trace] | None = None  # until somebody has taken its trace
        self._stopped = False
        self.lost: EngineDeadError | None = None  # why no rank will write anything any more
        self._count = 0
        self._live: dict[str, RequestTimes] = {}
        self._ended: list[RequestTimes] = []

    async def warm_up(self) -> None:
        """Have every rank begin and drop a recording: the first one takes torch's profiler long and much memory."""
        await self._order(StartRecording("", 1))
        await self._order(StopRecording())

    async def start(self, num_steps: int | None) -> None:
        """Raises ProfileConflict if a recording is under way, InvalidRequest for too many steps, and what the engines
        say."""
        if self._window is not None and not self._window.done():
            raise ProfileConflict("a profile is under way already; stop it with POST /stop_profile")
        most = self._options.max_steps
        if num_steps is not None and not 1 <= num_steps <= most:
            raise InvalidRequest(f"num_steps is {num_steps}; expected 1 to {most} (--profiler-max-steps)")
        parent = Path(self._options.folder)
        if sum(1 for _ in parent.glob("trace-*.json.gz")) >= MAX_TRACES:
            raise ProfileConflict(f"the server's folder for profiles has {MAX_TRACES} traces; remove some of them")
        try:
            folder = Path(tempfile.mkdtemp(prefix=".recording-", dir=parent))
        except OSError as e:
            raise ThalwegError(f"the server's folder for profiles cannot be written: {e.strerror}") from None
        self._ended, self._stopped, steps = [], False, num_steps or most
        order = StartRecording(str(folder), steps, self._options.max_bytes)
        started = asyncio.ensure_future(self._order(order))
        window = self._window = asyncio.create_task(self._record(folder, started, steps))
        try:
            await asyncio.shield(started)
        except Exception:
            await asyncio.wait([window])
            window.exception()  # the same, which is raised here
            self._window = None
            raise

    async def stop(self) -> Trace:
        """End the recording, or take the trace of the last one if it ended by itself. Raises ProfileConflict if there
        is none, ThalwegError if the trace could not be written."""
        window = self._window
        if window is None:
            raise ProfileConflict("no profile is under way; start one with POST /start_profile")
        await self._stop()
        try:
            return await asyncio.shield(window)
        finally:
            if self._window is window and window.done():
                self._window = None

    def added(self, request: Request) -> None:
        """It was handed over."""
        self._live[request.id] = RequestTimes(request.id, len(request.prompt_token_ids), time.perf_counter_ns())

    def updated(self, updates: Iterable[RequestUpdate], sent_at: float) -> None:
        """`sent_at` as in Updates, on a clock that all processes share with perf_counter."""
        now = int(sent_at * 1e9)
        for update in updates:
            times = self._live.get(update.request_id)
            if times is not None and update.token_ids and not times.first_token_ns:
                times.first_token_ns = now
            if update.finish_reason is not None:
                self.ended(update.request_id, now)

    def ended(self, request_id: str, now_ns: int | None = None) -> None:
        times = self._live.pop(request_id, None)
        if times is not None and self._window is not None and len(self._ended) < MAX_REQUESTS:
            times.ended_ns = now_ns or time.perf_counter_ns()
            self._ended.append(times)

    async def close(self) -> None:
        """Give up what is under way."""
        if self._window is not None:
            self._window.cancel()
            await asyncio.gather(self._window, return_exceptions=True)

    async def _stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            await self._order(StopRecording())

    async def _record(self, folder: Path, started: Awaitable[Any], most: int) -> Trace:
        """The trace of a window, however it ends."""
        try:
            await started
            full_of = await self._wait(folder)
            rows = rows_of_all(folder, self._ranks, self._share)
            full_of = "steps" if len(rows) >= most else full_of
            file = await self._join(folder) if rows else None
            size = 0 if file is None else file.stat().st_size
            return Trace(None if file is None else str(file), size, len(rows), self._ranks, full_of)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def _wait(self, folder: Path) -> str | None:
        """Until all ranks have written theirs; "bytes" if one of them was full of these."""
        deadline, full_of = None, None
        while absent := missing(folder, self._ranks):
            if self.lost is not None:
                raise self.lost
            if deadline is None and (self._stopped or len(absent) < self._ranks):
                deadline = time.monotonic() + WRITE_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                names = ", ".join(map(str, absent))
                raise ThalwegError(f"the trace of rank {names} was not written within {WRITE_SECONDS:g} s")
            if full_of is None and full_file(folder).exists():
                full_of = "bytes"
                await self._stop()
            await asyncio.sleep(POLL_SECONDS)
        return full_of

    async def _join(self, folder: Path) -> Path:
        task = JoinTask(self._ranks, read_recorded(folder, 0), [*self._ended, *self._live.values()])
        (folder / TASK_FILE).write_bytes(msgspec.json.encode(task))
        self._count += 1
        name = f"trace-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{self._count}.json.gz"
        output = Path(self._options.folder) / name
        command = [sys.executable, "-m", "thalweg.recorder.join", str(folder), str(output)]
        with (folder / "join.log").open("wb") as log:
            joining = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + WRITE_SECONDS
        try:
            while (code := joining.poll()) is None:
                if time.monotonic() > deadline:
                    raise ThalwegError(f"the ranks' traces were not joined within {WRITE_SECONDS:g} s")
                await asyncio.sleep(POLL_SECONDS)
        finally:
            joining.kill()
            joining.wait()
        if code:
            said = (folder / "join.log").read_text(errors="replace").strip().splitlines() or [f"exit code {code}"]
            raise ThalwegError(f"the trace was not written: {said[-1]}")
        return output
