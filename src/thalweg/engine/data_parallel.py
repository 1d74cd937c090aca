"""Data-parallel ranks for the callers of one process: engine processes, and a thread of this one that talks to them."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from thalweg.config.engine import EngineConfig
from thalweg.core import Request, RequestUpdate
from thalweg.engine.processes.engines import Engines
from thalweg.engine.pump import News
from thalweg.errors import EngineDeadError, InvalidRequest, ThalwegError
from thalweg.recorder.orders import Order
from thalweg.scheduler.scheduler import check_prompt_length

T = TypeVar("T")
Inbox = SimpleQueue[list[RequestUpdate] | EngineDeadError]


class DataParallelEngine:
    """Does for callers of this process what Engine does with one rank. Raises what an engine could not start for."""

    def __init__(self, config: EngineConfig) -> None:
        self._pid, self._closed, self._lock = os.getpid(), False, threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._engines = _Served(config)
        self._thread = threading.Thread(target=self._loop.run_forever, name="thalweg-engines", daemon=True)
        self._thread.start()
        self.pump = RemotePump(self)
        try:
            self.wait_for(self._engines.start())
        except BaseException:
            self.close()
            raise
        self.info = self._engines.info
        atexit.register(self.close)

    @property
    def engines(self) -> _Served:
        """For the loop's thread alone."""
        return self._engines

    @property
    def pids(self) -> list[int]:
        """Of the engine processes, by rank."""
        return [engine.process.pid for engine in self._engines.engines]

    def wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        """Have the loop's thread do something; what it gives. Raises EngineDeadError after `close`."""
        with self._lock:
            if self._closed:
                work.close()
                raise EngineDeadError("the engine was closed")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # if whoever waited has lost patience
            raise

    def order(self, order: Order) -> Future[Any]:
        """As Engine.order, of data-parallel rank 0."""

        async def first() -> Any:
            return (await self._engines.order(order))[0]

        return asyncio.run_coroutine_threadsafe(first(), self._loop)

    @property
    def forked(self) -> bool:
        """As Engine.forked."""
        return os.getpid() != self._pid

    def close(self) -> None:
        """End the engines. Does nothing if `forked`."""
        if self.forked:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            ended = asyncio.run_coroutine_threadsafe(self._engines.close(), self._loop)
        atexit.unregister(self.close)
        try:
            ended.result()
        finally:  # also if somebody has no patience for it
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


class RemotePump:
    """Requests to engine processes."""

    def __init__(self, engine: DataParallelEngine) -> None:
        self._engine = engine

    @contextmanager
    def running(self, requests: Sequence[Request]) -> Iterator[News]:
        engines, inbox = self._engine.engines, Inbox()
        for request in requests:
            if request.prompt_logits:
                ranks = engines.config.data_parallel_size
                raise InvalidRequest(f"prompt_logits needs data_parallel_size 1, which is {ranks}: logits stay in the"
                                     " process that computes them")  # fmt: skip
            check_prompt_length(len(request.prompt_token_ids), request.params, engines.info.max_model_len)
        try:
            self._engine.wait_for(engines.begin(requests, inbox))
            yield lambda: _news(inbox)
        finally:
            self._do(engines.end([request.id for request in requests]))

    def abort(self, request_id: str) -> None:
        self._do(self._engine.engines.end([request_id]))

    def keep(self, name: str, salt: str, token_ids: list[int]) -> int:
        return self._engine.wait_for(self._engine.engines.keep(name, salt, token_ids))

    def release(self, name: str) -> None:
        async def release() -> None:
            self._engine.engines.release(name)

        self._do(release())

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        """Something that an engine which is closed, or this process's parent's, need not do."""
        if self._engine.forked:
            work.close()
            return
        with contextlib.suppress(EngineDeadError):
            self._engine.wait_for(work)


def _news(inbox: Inbox) -> list[RequestUpdate]:
    updates: list[RequestUpdate] = []
    item = inbox.get()
    with contextlib.suppress(Empty):
        while isinstance(item, list):
            updates += item
            item = inbox.get_nowait()
    if isinstance(item, EngineDeadError):
        inbox.put(item)  # for whoever asks again
        if not updates:
            raise EngineDeadError(str(item))
    return updates


class _Served(Engines):
    """The engines, on the loop's thread."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._inboxes: dict[str, Inbox] = {}
        self._beginning: dict[str, asyncio.Future[None]] = {}  # requests that no engine has taken in yet

    async def begin(self, requests: Sequence[Request], inbox: Inbox) -> None:
        """Returns once all are taken in. Raises the first's refusal, if there is one; `end` is for the caller."""
        if self.dead is not None:
            raise self.dead
        loop = asyncio.get_running_loop()
        taken = {request.id: loop.create_future() for request in requests}
        self._inboxes.update(dict.fromkeys(taken, inbox))
        self._beginning.update(taken)
        self._add(requests)
        try:
            await asyncio.gather(*taken.values())
        finally:
            for request_id, future in taken.items():
                self._beginning.pop(request_id, None)
                future.cancel()

    async def end(self, request_ids: Sequence[str]) -> None:
        """Abort what has not ended of these, and forget all of them."""
        known = [request_id for request_id in request_ids if self._inboxes.pop(request_id, None) is not None]
        if self.dead is None:
            self._abort(*(request_id for request_id in known if self._balance.is_under_way(request_id)))
        for request_id in known:
            self._balance.forget(request_id)

    def _updated(self, updates: list[RequestUpdate], sent_at: float) -> None:
        news: dict[int, tuple[Inbox, list[RequestUpdate]]] = {}
        for update in updates:
            begun = self._beginning.pop(update.request_id, None)
            if begun is not None and not begun.done():
                begun.set_result(None)
            inbox = self._inboxes.get(update.request_id)
            if inbox is not None and (update.token_ids or update.finish_reason or update.prompt_logprobs):
                news.setdefault(id(inbox), (inbox, []))[1].append(update)
        for inbox, own in news.values():
            inbox.put(own)

    def _refused(self, request_id: str, error: ThalwegError) -> None:
        begun = self._beginning.pop(request_id, None)
        if begun is not None and not begun.done():
            begun.set_exception(error)

    def _lost(self, error: EngineDeadError) -> None:
        for begun in self._beginning.values():
            if not begun.done():
                begun.set_exception(error)
        for inbox in {id(inbox): inbox for inbox in self._inboxes.values()}.values():
            inbox.put(error)
