"""Keeps the steps of data-parallel ranks together: their experts need all of them in every step of any of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

LULL_SECONDS = 0.001  # that a rank waits for a plan of its own before it asks again whether anybody has one

Maxima = Callable[[Sequence[int]], list[int]]
"""The largest of the ranks' values, one by one: a collective."""


class WakeUp:
    """Tells a rank that one of them has a request: the `number`-th of such messages, which every rank gets in order."""

    def __init__(self, number: int) -> None:
        self.number = number


class LockStep:
    """What one rank knows of when to step, for the thread that launches its steps.

    Before each step all ranks agree on whether there is one; a rank without a plan then takes part with an idle step.
    They go to sleep at the same agreement: when no rank has a request, and all have seen the same wake-ups. A rank that
    sleeps takes part again from its next wake-up on, which the others, wherever they are, wait for in the agreement.

    `busy` is set by the engine's thread: whether it has requests. It must be true from before the wake-up that comes
    with a request is handed over, until the request has ended.
    """

    def __init__(self) -> None:
        self.busy = False
        self.awake = False
        self.patience = 0.0  # seconds to wait for a plan before the next agreement, while awake
        self._seen = 0
        self._maxima: Maxima
        self._idle_step: Callable[[], None]

    def begin(self, maxima: Maxima, idle_step: Callable[[], None]) -> None:
        """Once the rank is built."""
        self._maxima, self._idle_step = maxima, idle_step

    def wake(self, number: int) -> None:
        self._seen, self.awake = number, True

    def with_plan(self) -> None:
        """Before a step of this rank's own is launched."""
        if not self.awake:
            raise RuntimeError("a data-parallel rank has a step and was not woken")
        self._agree(1)

    def without_plan(self) -> None:
        """Take part in the others' step, if there is one."""
        if self._agree(0):
            self._idle_step()

    def _agree(self, plans: int) -> bool:
        """Whether any rank has a step."""
        most = self._maxima([plans, int(self.busy), self._seen, -self._seen])
        steps, busy, seen, least = most[0], most[1], most[2], -most[3]
        self.awake = bool(steps or busy or seen > least)
        self.patience = 0.0 if steps else LULL_SECONDS
        return bool(steps)
