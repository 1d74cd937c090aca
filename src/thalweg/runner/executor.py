"""Runs one rank on a thread of its own, so that planning and reading back go on beside it."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any, Generic, Protocol, TypeVar

from thalweg.core import StepPlan, StepResult
from thalweg.errors import EngineDeadError

Info = TypeVar("Info")


class Runner(Protocol):
    def execute(self, plan: StepPlan) -> StepResult: ...

    def close(self) -> None: ...


class Executor(Generic[Info]):
    """Builds a rank on its thread, then runs plans there, in order; results come as futures in the same order.

    After an exception, or after `fail`, every future fails: the cache may be half written, so no later step can be
    trusted. `build` gives the runner and whatever should be known about it. The thread is a daemon: a rank stuck in
    a collective does not keep the process alive.
    """

    def __init__(
        self, build: Callable[[], tuple[Runner, Info]], before: Callable[[StepPlan], None] | None = None
    ) -> None:
        self._build, self._before = build, before
        self._work: queue.SimpleQueue[tuple[StepPlan | None, Future[Any]]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open: set[Future[Any]] = set()
        self._failure: BaseException | None = None
        self._built: Future[Info] = self._track(Future())
        self._thread = threading.Thread(target=self._loop, name="thalweg-rank", daemon=True)
        self._thread.start()

    def info(self) -> Info:
        """What `build` told, once it is done. Raises what it raised."""
        return self._built.result()

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        future: Future[StepResult] = self._track(Future())
        self._work.put((plan, future))
        return future

    def fail(self, error: BaseException) -> None:
        """End everything under way and everything to come with `error`. Safe from any thread."""
        with self._lock:
            self._failure = self._failure or error
            waiting, self._open = self._open, set()
        for future in waiting:
            with contextlib.suppress(InvalidStateError):
                future.set_exception(self._failure)

    def close(self, timeout_s: float = 10.0) -> None:
        """Finish the plan under way, close the runner, end the thread. Waits no longer than `timeout_s`."""
        self._work.put((None, Future()))
        self._thread.join(timeout_s)

    def _track(self, future: Future[Any]) -> Future[Any]:
        with self._lock:
            failure = self._failure
            if failure is None:
                self._open.add(future)
        if failure is not None:
            future.set_exception(failure)
        return future

    def _settle(self, future: Future[Any], value: Any) -> None:
        with self._lock:
            self._open.discard(future)
        with contextlib.suppress(InvalidStateError):
            future.set_result(value)

    def _loop(self) -> None:
        try:
            runner, info = self._build()
        except BaseException as e:  # noqa: BLE001 -- it reaches the caller through the future
            self.fail(e)
            return
        self._settle(self._built, info)
        while True:
            plan, future = self._work.get()
            if plan is None:
                break
            if self._failure is not None:
                continue
            try:
                if self._before is not None:
                    self._before(plan)
                self._settle(future, runner.execute(plan))
            except Exception as e:  # noqa: BLE001 -- likewise
                self.fail(
                    e
                    if isinstance(e, EngineDeadError)
                    else EngineDeadError(f"step {plan.step} failed: {_one_line(e)}").with_traceback(e.__traceback__)
                )
        runner.close()


def _one_line(e: BaseException) -> str:
    text = str(e).strip().splitlines()
    return f"{type(e).__name__}: {text[0] if text else ''}"
