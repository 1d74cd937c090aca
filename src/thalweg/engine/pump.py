"""One engine for the callers of one process: a caller that waits drives it, and each gets its own requests' updates."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from thalweg.core import Request, RequestUpdate
from thalweg.engine.core import EngineCore
from thalweg.errors import EngineDeadError
from thalweg.sampling.grammars import Grammars

News = Callable[[], list[RequestUpdate]]
"""Waits until there are updates of a caller's requests, and gives them. Raises EngineDeadError."""


class Requests(Protocol):
    """What an engine does for callers of this process, which may overlap, also in several threads."""

    def running(self, requests: Sequence[Request]) -> AbstractContextManager[News]:
        """The requests' news; when the context ends, whatever is left of them is aborted.

        Raises InvalidRequest, and runs none of them, if the engine refuses one.
        """

    def abort(self, request_id: str) -> None:
        """End a request whose caller has all he wants of it."""

    def keep(self, name: str, salt: str, token_ids: list[int]) -> int:
        """As EngineCore.keep."""

    def release(self, name: str) -> None:
        """As EngineCore.release."""


class Pump:
    """Requests to an engine in this process. Calls may overlap, from several threads or by leaving a stream half read;
    none loses tokens to another."""

    def __init__(self, core: EngineCore, grammars: Grammars) -> None:
        self._core, self._grammars, self._lock = core, grammars, threading.RLock()
        self._inboxes: dict[str, deque[RequestUpdate]] = {}

    @contextmanager
    def running(self, requests: Sequence[Request]) -> Iterator[News]:
        for request in requests:
            if request.params.grammar is not None:
                self._grammars.compiled(request.params.grammar).result()
        inbox: deque[RequestUpdate] = deque()
        with self._lock:
            added = []
            try:
                for request in requests:
                    self._core.add(request)
                    added.append(request.id)
            except BaseException:
                for request_id in added:
                    self._core.abort(request_id)
                raise
            self._inboxes.update(dict.fromkeys(added, inbox))
        try:
            yield lambda: self._wait(inbox)
        finally:
            with self._lock:
                for request_id in added:
                    self._core.abort(request_id)
                    del self._inboxes[request_id]
                # Steps in flight are taken in, so that an engine without callers is an idle engine.
                with contextlib.suppress(EngineDeadError):
                    while not self._inboxes and self._core.has_work():
                        self._core.step()

    def _wait(self, inbox: deque[RequestUpdate]) -> list[RequestUpdate]:
        """Drive the engine until the inbox has news, and empty it."""
        with self._lock:
            while not inbox:
                if not self._core.has_work():
                    raise RuntimeError("waiting for requests that the engine does not have")
                for update in self._core.step():
                    owner = self._inboxes.get(update.request_id)
                    if owner is not None:
                        owner.append(update)
            news = list(inbox)
            inbox.clear()
            return news

    def abort(self, request_id: str) -> None:
        with self._lock:
            self._core.abort(request_id)

    def keep(self, name: str, salt: str, token_ids: list[int]) -> int:
        with self._lock:
            return self._core.keep(name, salt, token_ids)

    def release(self, name: str) -> None:
        with self._lock:
            self._core.release(name)
