"""Windows of steps that all ranks record: when one opens, when it is full, and what comes of it."""

from __future__ import annotations

import ctypes
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thalweg.core import StepPlan, StepResult
from thalweg.errors import ConfigError
from thalweg.recorder.orders import Recorded, StartRecording, StopRecording, rank_file
from thalweg.runner.executor import Executor


@dataclass(frozen=True, slots=True)
class Limits:
    """A window is full after so many steps, or once this process has allocated so many bytes more since it opened
    (where the C library tells). An event of a trace takes about as much memory as it takes in the trace's file."""

    steps: int
    bytes: int | None = None


class Recording:
    """Hands an engine's plans to its executor, and between two of them the orders to record. One window at a time."""

    def __init__(self, executor: Executor[Any], ranks: int, hosts: int = 1) -> None:
        self._executor, self.ranks, self._hosts = executor, ranks, hosts
        self.rows: list[tuple[int, int]] = []  # decode rows and prompt tokens of each recorded step
        self.full_of: str | None = None  # "steps" or "bytes", if that closed the window
        self._limits = Limits(0)
        self._folder = Path()
        self._after: int | None = None  # steps of decode rows alone to wait for before the window opens
        self._open = False
        self._memory = 0
        self._started: Future[None] | None = None
        self._recorded: Future[Recorded] | None = None

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        """As Executor.submit."""
        if self._after is not None:
            if self._after <= 0:
                self._start()
            elif not plan.prefills:
                self._after -= 1
        future = self._executor.submit(plan)
        if self._open:
            self.rows.append((len(plan.decode_slots), sum(p.length for p in plan.prefills)))
            grown = _memory() - self._memory
            if len(self.rows) >= self._limits.steps:
                self.stop("steps")
            elif self._limits.bytes is not None and grown > self._limits.bytes:
                self.stop("bytes")
        return future

    def warm_up(self) -> None:
        """Have every rank begin and drop a recording: the first one takes torch's profiler long and much memory."""
        self._executor.order(StartRecording())
        self._executor.order(StopRecording(""))

    def start(self, folder: Path, limits: Limits, after: int = 0) -> None:
        """Open a window before the next step, or before the one that follows `after` steps of decode rows alone. The
        ranks' traces will lie in `folder`. Only while there is none. Raises ConfigError if ranks are on other hosts."""
        if self._hosts > 1:
            raise ConfigError(f"--nnodes is {self._hosts}; expected 1: a trace needs all ranks on one host")
        self._folder, self._limits, self._after = folder, limits, after
        self.rows, self.full_of, self._recorded = [], None, None
        if after <= 0:
            self._start()

    def stop(self, full_of: str | None = None) -> None:
        """Close the window, if there is one, after the steps that were handed over."""
        self._after = None
        if self._open:
            self._open, self.full_of = False, full_of
            self._recorded = self._executor.order(StopRecording(str(self._folder)))

    @property
    def closed(self) -> bool:
        """Whether a window was opened and is closed again, be it still being written."""
        return self._recorded is not None

    def result(self) -> Recorded | None:
        """What rank 0 recorded, once every rank has written its trace; None before. Raises what kept rank 0 from it."""
        if self._started is None or self._recorded is None or not self._recorded.done():
            return None
        self._started.result()
        recorded = self._recorded.result()
        written = not recorded.began_ns or not self.missing()
        return recorded if written else None

    def missing(self) -> list[int]:
        """Ranks that have not written their trace (yet)."""
        return [rank for rank in range(self.ranks) if not rank_file(self._folder, rank).exists()]

    def _start(self) -> None:
        self._after, self._open, self._memory = None, True, _memory()
        self._started = self._executor.order(StartRecording())


_MALLINFO = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _MallInfo(ctypes.Structure):
    """`struct mallinfo2` of <malloc.h>."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in _MALLINFO)


def _memory() -> int:
    """Bytes that this process has allocated and not freed; 0 where the C library does not tell (glibc does).

    Not its resident memory, which grows as a CPU's cache is used for the first time.
    """
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return 0
    ask.restype = _MallInfo
    info = ask()
    return int(info.uordblks + info.hblkhd)
