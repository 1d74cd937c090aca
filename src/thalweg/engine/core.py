"""The step loop: plan step n + 1 while step n runs, then take in step n's tokens."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from typing import Any

from thalweg import tracing
from thalweg.core import Request, RequestUpdate, SchedulerStats, StepPlan, StepResult
from thalweg.runner.executor import Executor
from thalweg.scheduler.scheduler import Scheduler

STEPS_AHEAD = 1  # plans submitted beyond the one whose result is awaited


class EngineCore:
    """Requests in, updates out; owns the scheduler and feeds the executor. Not thread-safe: one loop drives it."""

    def __init__(self, scheduler: Scheduler, executor: Executor[Any]) -> None:
        self.scheduler, self._executor = scheduler, executor
        self._in_flight: deque[tuple[StepPlan, Future[StepResult]]] = deque()

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequest if it can never run; nothing else is touched then."""
        self.scheduler.add(request)

    def abort(self, request_id: str) -> bool:
        """End a request without further updates and free what it holds. False if it is not (any more) here."""
        return self.scheduler.abort(request_id)

    def has_work(self) -> bool:
        return bool(self._in_flight) or self.scheduler.has_work()

    def step(self) -> list[RequestUpdate]:
        """Submit the next plan, if there is one; then, unless that put the device exactly one step ahead, wait for
        the oldest step and return its updates. Raises EngineDeadError when a rank died.
        """
        with tracing.span("schedule"):
            plan = self.scheduler.schedule()
        if plan is not None:
            self._in_flight.append((plan, self._executor.submit(plan)))
            if len(self._in_flight) <= STEPS_AHEAD:
                return []
        if not self._in_flight:
            return []
        done, future = self._in_flight[0]
        result = future.result()  # may be interrupted, and asked again: the step is taken out after it
        self._in_flight.popleft()
        with tracing.span("update"):
            updates = self.scheduler.update(done, result)
        if not self.has_work():
            self.scheduler.check_idle()
        return updates

    def stats(self) -> SchedulerStats:
        return self.scheduler.stats()

    def close(self) -> None:
        self._executor.close()
