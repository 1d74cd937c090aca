"""Data-parallel ranks step together and sleep together, in whatever order requests and messages arrive."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from thalweg.core import Prefill, StepPlan, StepResult
from thalweg.errors import EngineDeadError
from thalweg.runner.executor import Executor
from thalweg.runner.lock_step import LockStep, Rows, WakeUp

SECONDS = 5.0  # after which a rank is taken to hang


class Collective:
    """The largest of the ranks' values, over threads. Raises if a rank does not come."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size)
        self._values: dict[int, list[int]] = {}
        self.calls = 0

    def maxima(self, rank: int, values: Sequence[int]) -> list[int]:
        self._values[rank] = list(values)
        try:
            self._barrier.wait(SECONDS)
            most = [max(column) for column in zip(*self._values.values(), strict=True)]
            self.calls += self._barrier.wait(SECONDS) == 0
        except threading.BrokenBarrierError:
            raise EngineDeadError("a rank did not come") from None
        return most

    def lose(self) -> None:
        self._barrier.abort()


class Ranks:
    """What a rank sees of the collective."""

    def __init__(self, collective: Collective, rank: int) -> None:
        self._collective, self._rank = collective, rank
        self.rows, self.decodes = -1, False

    def maxima(self, values: Sequence[int]) -> list[int]:
        return self._collective.maxima(self._rank, values)


@dataclass
class Runner:
    """Its steps meet those of the other ranks, as layers of experts do."""

    collective: Collective
    rank: int
    waits: bool = False
    plans: list[int] = field(default_factory=list)  # of this rank's own
    steps: list[int] = field(default_factory=list)  # ranks that had a plan in each step
    obeyed: list[tuple[object, int]] = field(default_factory=list)  # orders, and the steps before each

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        self._exchange(own=True)
        self.plans.append(plan.step)
        return lambda: StepResult(plan.step, [])

    def idle(self) -> None:
        self._exchange(own=False)

    def obey(self, order: object) -> object:
        self.obeyed.append((order, len(self.steps)))
        return order

    def close(self) -> None:
        pass

    def _exchange(self, *, own: bool) -> None:
        size = self.collective._barrier.parties
        flags = [int(own and rank == self.rank) for rank in range(size)]
        self.steps.append(sum(self.collective.maxima(self.rank, flags)))


class Rank:
    """An engine process in small: takes messages, submits the plans of its requests, waits for results."""

    def __init__(self, collective: Collective, rank: int, seed: int, *, waits: bool) -> None:
        self.runner = Runner(collective, rank, waits)
        self.lock_step = LockStep()
        # (wake-up, plans of a request); None: an order to all
        self.inbox: queue.SimpleQueue[tuple[int, int | None] | None] = queue.SimpleQueue()
        self.done = threading.Event()
        self._random = random.Random(100 * seed + rank)
        self.ranks = Ranks(collective, rank)

        def build() -> tuple[Runner, None]:
            self.lock_step.begin(self.ranks, self.runner.idle, rows_of)
            return self.runner, None

        self.executor: Executor[None] = Executor(build, lock_step=self.lock_step)
        self.executor.info()
        self.thread = threading.Thread(target=self._loop, daemon=True)
        self.thread.start()

    def _loop(self) -> None:
        left: list[int] = []  # plans of each request
        step, futures, stopping = 0, [], False
        while True:
            self.lock_step.busy = bool(left or futures)
            if stopping and not self.lock_step.busy:
                self.done.set()
                return
            while True:
                try:
                    message = self.inbox.get(timeout=0.0 if left or futures else None)
                except queue.Empty:
                    break
                if message is None:
                    stopping = True
                    break
                number, plans = message
                if self._random.random() < 0.2:
                    time.sleep(self._random.choice([0.001, 0.01]))  # it comes late
                if plans:
                    self.lock_step.busy = True
                    left.append(plans)
                if plans is None:
                    self.executor.order(number, wake=number)
                else:
                    self.executor.wake(number)
                if not left:
                    break
            if self._random.random() < 0.1:
                time.sleep(0.002)  # a grammar is compiled, or the host is slow
            if left:
                step += 1
                futures.append(self.executor.submit(StepPlan(step, [], [], [1], [1], [])))
                left = [n - 1 for n in left if n > 1]
            if futures and (len(futures) > 1 or not left):
                try:
                    futures.pop(0).result(SECONDS)
                except EngineDeadError:
                    return


class Client:
    def __init__(self, ranks: list[Rank]) -> None:
        self.ranks, self.wakes = ranks, 0

    def request(self, rank: int, plans: int) -> None:
        self.wakes += 1
        for i, each in enumerate(self.ranks):
            each.inbox.put((self.wakes, plans if i == rank else 0))

    def order(self) -> None:
        self.wakes += 1
        for each in self.ranks:
            each.inbox.put((self.wakes, None))


class SlowRunner(Runner):
    """Steps run one after another on a device, for longer than a rank waits for a plan."""

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        finish = super().launch(plan)
        ends = self._end_of_step()
        return lambda: (time.sleep(max(0.0, ends - time.monotonic())), finish())[1]

    def idle(self) -> None:
        super().idle()
        self._end_of_step()

    def _end_of_step(self) -> float:
        self._ends = max(getattr(self, "_ends", 0.0), time.monotonic()) + 0.006
        return self._ends


def rows_of(plan: StepPlan) -> Rows:
    rows = len(plan.decode_slots)
    return Rows(rows, 100 * (rows + sum(p.length for p in plan.prefills)), not plan.prefills and rows <= 4)


def decodes(rows: int) -> StepPlan:
    return StepPlan(1, [], [], list(range(1, rows + 1)), [5] * rows, [])


def prefills() -> StepPlan:
    return StepPlan(1, [], [], [1], [5], [Prefill(2, 0, 3, True)])


def asleep(ranks: list[Rank]) -> bool:
    return not any(rank.lock_step.awake or rank.lock_step.busy for rank in ranks)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it hangs"
        time.sleep(0.001)


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_every_request_is_served_and_all_ranks_sleep_in_the_end(seed: int, waits: bool) -> None:
    chance = random.Random(seed)
    size = chance.choice([2, 3, 5])
    collective = Collective(size)
    ranks = [Rank(collective, rank, seed, waits=waits) for rank in range(size)]
    client, expected, orders = Client(ranks), [0] * size, []
    for _ in range(30):
        rank, plans = chance.randrange(size), chance.choice([1, 1, 2, 3, 10])
        expected[rank] += plans
        client.request(rank, plans)
        if chance.random() < 0.2:
            client.order()
            orders.append(client.wakes)
        if chance.random() < 0.3:
            time.sleep(chance.choice([0.0, 0.001, 0.01]))
        if chance.random() < 0.1:
            until(lambda: asleep(ranks))
    for rank in ranks:
        rank.inbox.put(None)
        assert rank.done.wait(SECONDS)
    until(lambda: asleep(ranks))
    for rank, least in zip(ranks, expected, strict=True):
        rank.executor.check()
        # Requests of one step share a plan.
        assert 0 < len(rank.runner.plans) <= least or not least
        assert rank.runner.plans == sorted(rank.runner.plans)
        assert rank.runner.steps == ranks[0].runner.steps  # every rank took part in every step
        assert all(rank.runner.steps)  # and no step was nobody's
        assert rank.runner.obeyed == ranks[0].runner.obeyed  # all obeyed between the same two steps
        assert [order for order, _ in rank.runner.obeyed] == orders


def test_ranks_without_requests_do_not_call_collectives() -> None:
    collective = Collective(2)
    ranks = [Rank(collective, rank, 0, waits=False) for rank in range(2)]
    client = Client(ranks)
    client.request(1, 3)
    until(lambda: len(ranks[1].runner.plans) == 3 and asleep(ranks))
    calls = collective.calls
    time.sleep(0.05)
    assert collective.calls == calls


def test_a_lost_rank_ends_those_that_wait_for_it() -> None:
    collective = Collective(2)
    ranks = [Rank(collective, rank, 0, waits=False) for rank in range(2)]
    ranks[0].inbox.put((1, 5))  # the other one never hears of it
    time.sleep(0.02)
    collective.lose()

    until(lambda: ranks[0].executor._failure is not None)
    with pytest.raises(EngineDeadError, match="did not come"):
        ranks[0].executor.check()


def test_ranks_with_requests_step_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in turns, though one plans later than the other, and began later."""
    monkeypatch.setattr("tests.unit.test_lock_step.Runner", SlowRunner)
    collective = Collective(2)
    ranks = [Rank(collective, rank, seed=1, waits=True) for rank in range(2)]
    client = Client(ranks)
    client.request(0, 60)
    time.sleep(0.02)
    client.request(1, 40)
    for rank in ranks:
        rank.inbox.put(None)
    for rank in ranks:
        assert rank.done.wait(SECONDS)
    together = ranks[0].runner.steps.count(2)
    assert together >= 34, ranks[0].runner.steps
    assert len(ranks[1].runner.plans) == 40


def test_a_plan_of_a_rank_that_was_not_woken_is_an_error() -> None:
    rank = Rank(Collective(1), 0, 0, waits=False)
    with pytest.raises(EngineDeadError, match="was not woken"):
        rank.executor.submit(StepPlan(1, [], [], [1], [1], [])).result(SECONDS)


@pytest.mark.parametrize(
    ("plans", "rows", "only_decodes"),
    [
        ([decodes(3), decodes(1)], 3, True),
        ([None, decodes(2)], 2, True),
        ([decodes(5), decodes(1)], 500, False),  # more than graphs of decode rows hold
        ([decodes(4), prefills()], 400, False),
        ([decodes(4), None], 4, True),
        ([None, prefills()], 400, False),
        ([prefills(), prefills()], 400, False),
    ],
)
def test_ranks_agree_on_rows(plans: list[StepPlan | None], rows: int, only_decodes: bool) -> None:
    collective = Collective(2)
    ranks = [Ranks(collective, rank) for rank in range(2)]

    def step(ranks: Ranks, plan: StepPlan | None) -> None:
        lock_step = LockStep()
        lock_step.begin(ranks, lambda: None, rows_of)
        lock_step.wake(WakeUp(1))
        if plan is None:
            lock_step.without_plan()
        else:
            lock_step.with_plan(plan)

    threads = [threading.Thread(target=step, args=pair, daemon=True) for pair in zip(ranks, plans, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert [(each.rows, each.decodes) for each in ranks] == [(rows, only_decodes)] * 2
