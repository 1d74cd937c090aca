"""The step loop: plan step n + 1 while step n runs, then take in step n's tokens."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from typing import Any

from thalweg import tracing
from thalweg.core import Request, RequestUpdate, SchedulerStats, StepPlan, StepResult
from thalweg.errors import EngineDeadError
from thalweg.runner.executor import Executor
from thalweg.scheduler.scheduler import Scheduler

STEPS_AHEAD = 1  # plans submitted beyond the one whose result is awaited


class EngineCore:
    """Requests in, updates out; owns the scheduler and feeds the executor. Not thread-safe: one loop drives it."""

    def __init__(self, scheduler: Scheduler, executor: Executor[Any], step_timeout_s: float = 300.0) -> None:
        self.scheduler, self._executor, self._step_timeout_s = scheduler, executor, step_timeout_s
        self._in_flight: deque[tuple[StepPlan, Future[StepResult]]] = deque()

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequest if it can never run; nothing else is touched then."""
        self.scheduler.add(request)

    def abort(self, request_id: str) -> bool:
        """End a request without further updates and free what it holds. False if it is not (any more) here."""
        return self.scheduler.abort(request_id)

    def keep(self, name: str, salt: str, token_ids: list[int]) -> int:
        """Have what is cached of these tokens make room for others last: how many of them that is."""
        return self.scheduler.keep(name, salt, token_ids)

    def release(self, name: str) -> None:
        """Undo `keep`."""
        self.scheduler.release(name)

    def is_queued(self, request_id: str) -> bool:
        """Whether a request waits for its first slot."""
        return self.scheduler.is_queued(request_id)

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
        # The wait may be interrupted and come again: the step is taken out after it.
        result = self._wait(done, future)
        self._in_flight.popleft()
        with tracing.span("update"):
            updates = self.scheduler.update(done, result)
        if not self.has_work():
            self.scheduler.check_idle()
        return updates

    def _wait(self, plan: StepPlan, future: Future[StepResult]) -> StepResult:
        try:
            return future.result(self._step_timeout_s)
        except TimeoutError:
            if future.done():
                raise  # the step's own
            reason = f"step {plan.step} has not ended after {self._step_timeout_s:g} s; a rank hangs, or --step-timeout"
            self._executor.fail(EngineDeadError(f"{reason} is too short"))
            return future.result()

    def check(self) -> None:
        """Raises EngineDeadError if a rank has died, which an engine without work would not notice otherwise."""
        self._executor.check()

    def stats(self) -> SchedulerStats:
        return self.scheduler.stats()

    def close(self) -> None:
        self._executor.close()
