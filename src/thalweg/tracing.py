"""Spans: where a step's host time goes, for whoever asks. While nobody asks, a span costs next to nothing."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import TracebackType

Clock = Callable[[], int]
MakeSpan = Callable[[str], AbstractContextManager[object]]
STEP = "step"  # the span around one launch of a recorded runner
MAX_SPANS = 100_000  # kept of each name, the latest


class Recorder:
    """Durations by span name, in nanoseconds of `clock`, in the order the spans ended. Any thread may write."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.durations: defaultdict[str, deque[int]] = defaultdict(partial(deque, maxlen=MAX_SPANS))

    def span(self, name: str) -> AbstractContextManager[None]:
        return _Span(self.clock, self.durations[name])


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
_make_span: MakeSpan | None = None


def span(name: str) -> AbstractContextManager[object]:
    """A context whose duration goes to whoever records or forwards spans."""
    make = _make_span
    return _NOTHING if make is None else make(name)


@contextmanager
def forward(make: MakeSpan) -> Iterator[None]:
    """Let `make(name)` be every span of this process, on any thread, until the context ends; a profiler's annotation,
    say. Spans open at the end are still closed. One record() or forward() at a time; raises RuntimeError otherwise.
    """
    global _make_span
    if _make_span is not None:
        raise RuntimeError("spans are being recorded already; expected one record() or forward() at a time")
    _make_span = make
    try:
        yield
    finally:
        _make_span = None


@contextmanager
def record(clock: Clock = time.perf_counter_ns) -> Iterator[Recorder]:
    """Collect every span of this process until the context ends. One at a time; raises RuntimeError otherwise.

    With time.thread_time_ns a span is what its own thread worked, without the time it waited for others.
    """
    recorder = Recorder(clock)
    with forward(recorder.span):
        yield recorder
