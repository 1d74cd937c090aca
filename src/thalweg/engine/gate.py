"""Where requests wait for their grammar, so that no step waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from thalweg.core import Request
from thalweg.errors import InvalidRequest, QueueTimeout, ThalwegError
from thalweg.sampling.grammars import Grammars

COMPILE_SECONDS = 10.0


class GrammarGate:
    """`add` gets a request when it may run, `refuse` the id of one whose grammar cannot be used, and why.

    Compilation goes on beside the loop that calls `poll`; a grammar that takes longer than COMPILE_SECONDS is given up.
    One that had to wait so long for others' is not a fault of its own: that is a QueueTimeout.
    """

    def __init__(
        self, grammars: Grammars, add: Callable[[Request], None], refuse: Callable[[str, ThalwegError], None]
    ) -> None:
        self._grammars, self._add, self._refuse = grammars, add, refuse
        self._waiting: dict[str, tuple[Request, Future[Any], float]] = {}

    @property
    def waiting(self) -> bool:
        return bool(self._waiting)

    def take(self, request: Request) -> None:
        """Pass the request on, at once where its grammar is known or it has none."""
        if request.params.grammar is None:
            self._add(request)
            return
        future = self._grammars.compiled(request.params.grammar)
        self._waiting[request.id] = request, future, time.monotonic() + COMPILE_SECONDS
        self.poll()

    def abort(self, request_id: str) -> None:
        """Forget a request, if it waits here."""
        self._waiting.pop(request_id, None)

    def poll(self) -> None:
        """Let through, or refuse, what need not wait any longer."""
        if not self._waiting:
            return
        now = time.monotonic()
        for request, future, deadline in list(self._waiting.values()):
            if not future.done() and now < deadline:
                continue
            del self._waiting[request.id]
            if not future.done():
                self._refuse(request.id, _late(future))
            elif (error := future.exception()) is None:
                self._add(request)
            elif isinstance(error, InvalidRequest):
                self._refuse(request.id, error)
            else:
                self._refuse(request.id, InvalidRequest(f"the grammar cannot be used: {type(error).__name__}"))


def _late(future: Future[Any]) -> ThalwegError:
    if future.running():
        return InvalidRequest(f"the grammar takes more than {COMPILE_SECONDS:g} seconds to compile")
    return QueueTimeout(f"the grammar waited for {COMPILE_SECONDS:g} seconds while others were compiled; try later")
