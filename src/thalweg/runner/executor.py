"""Runs one rank on a thread of its own, so that planning and reading back go on beside it."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any, Generic, Protocol, TypeVar

from thalweg.core import StepPlan, StepResult
from thalweg.errors import EngineDeadError, RankLostError
from thalweg.runner.lock_step import LockStep, WakeUp

Info = TypeVar("Info")
WATCHER_SECONDS = 6.0  # for the end of a rank or host to be noticed, which is felt sooner in a collective


class Runner(Protocol):
    waits: bool  # whether the call that `launch` returns waits for a device

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]: ...

    def obey(self, order: Any) -> Any: ...

    def close(self) -> None: ...


class Executor(Generic[Info]):
    """Builds a rank on its thread, then launches plans there, in order; results come as futures in the same order.
    If results have to be waited for, a second thread waits, and the next plan is launched meanwhile. With a `lock_step`
    the rank also takes part in other data-parallel ranks' steps.

    After an exception, or after `fail`, every future fails: the cache may be half written, so no later step can be
    trusted. `build` gives the runner and whatever should be known about it; `before` is called with each plan and
    order first. The thread is a daemon: a rank stuck in a collective does not keep the process alive.
    """

    def __init__(
        self,
        build: Callable[[], tuple[Runner, Info]],
        before: Callable[[Any], None] | None = None,
        lock_step: LockStep | None = None,
    ) -> None:
        self._build, self._before, self._lock_step = build, before, lock_step
        self._work: queue.SimpleQueue[tuple[Any, Future[Any]]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open: set[Future[Any]] = set()
        self._failure: BaseException | None = None
        self._failed = threading.Event()
        self._built: Future[Info] = self._track(Future())
        self._runner: Runner  # from when it is built until it is closed; of the thread
        self._thread = threading.Thread(target=self._loop, name="thalweg-rank", daemon=True)
        self._thread.start()

    def info(self) -> Info:
        """What `build` told, once it is done. Raises what it raised."""
        return self._built.result()

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        future: Future[StepResult] = self._track(Future())
        self._work.put((plan, future))
        return future

    def order(self, order: Any, wake: int | None = None) -> Future[Any]:
        """Have the runner obey something between two plans; what it gives comes as a future. It may fail alone.

        With the number of a `wake`-up, data-parallel ranks obey it together, between two steps of all of them.
        """
        future: Future[Any] = self._track(Future())
        if wake is None:
            self._work.put((order, future))
        else:
            self._work.put((WakeUp(wake, lambda: self._obey(order, future)), Future()))
        return future

    def wake(self, number: int) -> None:
        """Hand a wake-up over, behind what was handed over before."""
        self._work.put((WakeUp(number), Future()))

    def _fail(self, error: BaseException) -> None:
        """`fail` with an error of this rank. One that lost another leaves it to whoever watches that one to say why."""
        if not isinstance(error, RankLostError) or not self._failed.wait(WATCHER_SECONDS):
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """End everything under way and everything to come with `error`. Safe from any thread."""
        with self._lock:
            self._failure = self._failure or error
            waiting, self._open = self._open, set()
            self._failed.set()
        for future in waiting:
            with contextlib.suppress(InvalidStateError):
                future.set_exception(self._failure)

    def close(self, timeout_s: float = 10.0) -> None:
        """Finish the step under way, leave out what follows, close the runner, end the thread. Waits no longer than
        `timeout_s`."""
        lost = self._failure is not None
        self.fail(EngineDeadError("the engine is closed"))  # nobody is told any more why a rank was lost
        self._work.put((None, Future()))
        if not lost:  # else the thread may be in a collective that ends with the other ranks
            self.join(timeout_s)

    def join(self, timeout_s: float) -> None:
        """Wait for the end of the thread. Python stops daemon threads when the process ends, and one that comes back
        from torch's code then aborts the process."""
        self._thread.join(timeout_s)

    def failure(self) -> str:
        """What ended the rank, in words; "" if nothing did."""
        return "" if self._failure is None else str(self._failure) or type(self._failure).__name__

    def check(self) -> None:
        """Raises what ended the rank, if something did."""
        if self._failure is not None:
            raise _again(self._failure)

    def _track(self, future: Future[Any]) -> Future[Any]:
        with self._lock:
            failure = self._failure
            if failure is None:
                self._open.add(future)
        if failure is not None:
            future.set_exception(_again(failure))
        return future

    def _settle(self, future: Future[Any], value: Any) -> None:
        with self._lock:
            self._open.discard(future)
        with contextlib.suppress(InvalidStateError):
            future.set_result(value)

    def _settle_step(self, future: Future[Any], result: StepResult) -> None:
        if self._lock_step is not None:
            self._lock_step.settled()
        self._settle(future, result)

    def _loop(self) -> None:
        try:
            runner, info = self._build()
            self._runner = runner
        except BaseException as e:  # noqa: BLE001 -- it reaches the caller through the future
            self._fail(e)
            return
        self._settle(self._built, info)
        results: queue.SimpleQueue[tuple[Callable[[], StepResult], int, Future[Any]] | None] = queue.SimpleQueue()
        reader = threading.Thread(target=self._read, args=(results,), name="thalweg-readback", daemon=True)
        if runner.waits:
            reader.start()
        while True:
            plan, future = self._next()
            if plan is None:
                break
            if self._failure is not None:
                continue
            if not isinstance(plan, StepPlan):
                self._obey(plan, future)
                continue
            try:
                if self._lock_step is not None:
                    self._lock_step.with_plan(plan)
                if self._before is not None:
                    self._before(plan)
                finish = runner.launch(plan)
                if runner.waits:
                    results.put((finish, plan.step, future))
                else:
                    self._settle_step(future, finish())
            except Exception as e:  # noqa: BLE001 -- likewise
                self._fail(_step_error(f"step {plan.step}", e))
        if runner.waits:
            results.put(None)
            reader.join()
        runner.close()
        del self._runner  # its memory goes, whoever still knows this executor

    def _next(self) -> tuple[Any, Future[Any]]:
        """What was handed over next; until then the steps of other data-parallel ranks."""
        lock = self._lock_step
        if lock is None:
            return self._work.get()
        while True:
            waits = not lock.awake or self._failure is not None
            try:
                work = self._work.get(timeout=None if waits else lock.patience)
            except queue.Empty:
                try:
                    lock.without_plan()
                except Exception as e:  # noqa: BLE001 -- likewise
                    self._fail(_step_error("a step of other ranks", e))
                continue
            if not isinstance(work[0], WakeUp):
                return work
            lock.wake(work[0])

    def _obey(self, order: Any, future: Future[Any]) -> None:
        if self._before is not None:
            self._before(order)
        try:
            self._settle(future, self._runner.obey(order))
        except Exception as e:  # noqa: BLE001 -- it reaches whoever gave the order; steps go on
            with self._lock:
                self._open.discard(future)
            with contextlib.suppress(InvalidStateError):
                future.set_exception(e)

    def _read(self, results: queue.SimpleQueue[tuple[Callable[[], StepResult], int, Future[Any]] | None]) -> None:
        while (item := results.get()) is not None:
            finish, step, future = item
            try:
                self._settle_step(future, finish())
            except Exception as e:  # noqa: BLE001 -- likewise
                self._fail(_step_error(f"step {step}", e))


def _again(failure: BaseException) -> BaseException:
    """The same error anew: one object raised over and over would collect every caller's frames."""
    return EngineDeadError(str(failure)) if isinstance(failure, EngineDeadError) else failure


def _step_error(step: str, e: Exception) -> EngineDeadError:
    if isinstance(e, EngineDeadError):
        return e
    text = str(e).strip().splitlines()
    reason = f"{type(e).__name__}: {text[0] if text else ''}"
    return EngineDeadError(f"{step} failed: {reason}").with_traceback(e.__traceback__)
