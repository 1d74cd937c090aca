"""Spans: where a step's host time goes, for whoever asks. While nobody records, a span costs next to nothing."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import TracebackType

Clock = Callable[[], int]
MAX_SPANS = 100_000  # kept of each name, the latest


class Recorder:
    """Durations by span name, in nanoseconds of `clock`, in the order the spans ended. Any thread may write."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.durations: defaultdict[str, deque[int]] = defaultdict(partial(deque, maxlen=MAX_SPANS))


class _Span:
    __slots__ = ("_began", "_clock", "_durations")

    def __init__(self, clock: Clock, durations: deque[int]) -> None:
        self._clock, self._durations = clock, durations

    def __enter__(self) -> None:
        self._began = self._clock()

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._durations.append(self._clock() - self._began)


class _Nothing:
    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        pass


_NOTHING = _Nothing()
_recorder: Recorder | None = None


def span(name: str) -> AbstractContextManager[None]:
    """A context whose duration is kept under `name`, if somebody records."""
    recorder = _recorder
    return _NOTHING if recorder is None else _Span(recorder.clock, recorder.durations[name])


@contextmanager
def record(clock: Clock = time.perf_counter_ns) -> Iterator[Recorder]:
    """Collect every span of this process until the context ends. One at a time; raises RuntimeError otherwise.

    With time.thread_time_ns a span is what its own thread worked, without the time it waited for others.
    """
    global _recorder
    if _recorder is not None:
        raise RuntimeError("spans are being recorded already; expected one record() at a time")
    _recorder = Recorder(clock)
    try:
        yield _recorder
    finally:
        _recorder = None
