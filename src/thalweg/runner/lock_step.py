"""Keeps the steps of data-parallel ranks together: their experts need all of them in every step of any of them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import msgspec

from thalweg.core import StepPlan

LULL_SECONDS = 0.001  # that a rank waits for a plan of its own before it asks again whether anybody has one
PLANNING_SECONDS = 0.002  # from a result to the plan that follows from it, at most if others are to wait for that


class Rows(NamedTuple):
    """What a rank brings to the experts of its next step."""

    decodes: int = 0  # rows, if all ranks only decode
    padded: int = 0  # rows that it pads its own to otherwise; 0 on all ranks, if they do not pad
    only_decodes: bool = True  # whether it has no more than a graph of decode rows holds


class Ranks(Protocol):
    rows: int  # is told before a step: rows that each rank pads its own to, 0 if they are not padded
    decodes: bool  # and whether all have decode rows alone

    def maxima(self, values: Sequence[int]) -> list[int]:
        """The largest of the ranks' values, one by one: a collective."""


class Agreed(msgspec.Struct, frozen=True, array_like=True, tag="agreed"):
    """What data-parallel ranks agreed on before a step, for those that share a model with one of them: the rows that
    each pads its own to and whether these all decode (Ranks), and whether the step is an idle one, or of the plan that
    comes next."""

    rows: int
    decodes: bool
    idle: bool


@dataclass(frozen=True, slots=True)
class WakeUp:
    """Tells a rank that one of them has a request: the `number`-th of such messages, which every rank gets in order.
    Or that all are to do something together, which this rank does by `then`."""

    number: int
    then: Callable[[], None] | None = None


class LockStep:
    """What one rank knows of when to step, for the thread that launches its steps.

    Before each step all ranks agree on whether there is one; a rank without a plan then takes part with an idle step.
    They go to sleep at the same agreement: when no rank has a request, and all have seen the same wake-ups. A rank that
    sleeps takes part again from its next wake-up on, which the others, wherever they are, wait for in the agreement.
    What ranks are to do together they do at one agreement too: the first at which all have seen that wake-up.

    A step is of all ranks that decode: those with a plan wait for one whose next plan follows from a result that is not
    there yet. Otherwise ranks whose plans come a moment apart would step in turns, each step with the rows of one.

    `busy` is set by the engine's thread: whether it has requests. It must be true from before the wake-up that comes
    with a request is handed over, until the request has ended.
    """

    def __init__(self) -> None:
        self.busy = False
        self.awake = False
        self._seen = 0
        self._to_do: deque[WakeUp] = deque()
        self._launched, self._settled, self._settled_at = 0, 0, 0.0  # steps with a plan of this rank
        self._ranks: Ranks
        self._idle_step: Callable[[], None]
        self._rows_of: Callable[[StepPlan], Rows]
        self._tell: Callable[[Agreed], None] | None = None

    def begin(
        self,
        ranks: Ranks,
        idle_step: Callable[[], None],
        rows_of: Callable[[StepPlan], Rows],
        tell: Callable[[Agreed], None] | None = None,
    ) -> None:
        """Once the rank is built. `tell` is called with what was agreed on before each step, for the ranks that share
        this one's model."""
        self._ranks, self._idle_step, self._rows_of, self._tell = ranks, idle_step, rows_of, tell

    def wake(self, wake_up: WakeUp) -> None:
        self._seen, self.awake = wake_up.number, True
        if wake_up.then is not None:
            self._to_do.append(wake_up)

    def settled(self) -> None:
        """A step of this rank's own has a result; from any thread."""
        self._settled_at = time.monotonic()
        self._settled += 1

    @property
    def patience(self) -> float:
        """Seconds to wait for a plan before the next agreement, while awake. Who has no request waits there."""
        if not self.busy:
            return 0.0
        return LULL_SECONDS if self._plans_soon else LULL_SECONDS / 4

    @property
    def _plans_soon(self) -> bool:
        """Whether a plan of this rank's own will come once a result is there, or has been for a moment."""
        in_flight = self._launched > self._settled
        return self.busy and (in_flight or time.monotonic() - self._settled_at < PLANNING_SECONDS)

    def with_plan(self, plan: StepPlan) -> None:
        """Before a step of this rank's own is launched."""
        if not self.awake:
            raise RuntimeError("a data-parallel rank has a step and was not woken")
        rows = self._rows_of(plan)
        while not self._agree(1, rows):
            pass
        self._launched += 1

    def without_plan(self) -> None:
        """Take part in the others' step, if there is one."""
        if self._agree(0, Rows()):
            self._idle_step()

    def _agree(self, plans: int, rows: Rows) -> bool:
        """Whether there is a step."""
        waits = not plans and self._plans_soon
        of_rows = rows.decodes, rows.padded, not rows.only_decodes
        most = self._ranks.maxima([plans, int(self.busy), self._seen, -self._seen, waits, *of_rows])
        plan, busy, seen, unseen, wait, decodes, padded, mixed = most
        self._ranks.rows, self._ranks.decodes = padded if mixed else decodes, not mixed
        self.awake = bool(plan or busy or seen > -unseen)
        while self._to_do and self._to_do[0].number <= -unseen:
            then = self._to_do.popleft().then
            assert then is not None
            then()
        steps = bool(plan and not wait)
        if steps and self._tell is not None:
            self._tell(Agreed(self._ranks.rows, self._ranks.decodes, not plans))
        return steps
