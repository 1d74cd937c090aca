"""The engine process: `python -m thalweg.engine.processes.main ADDRESS`. Messages in, updates out."""

from __future__ import annotations

import contextlib
import logging
import os
import socket as sockets
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import zmq

from thalweg.config.engine import EngineConfig
from thalweg.core import Request, RequestUpdate
from thalweg.engine.gate import GrammarGate
from thalweg.engine.processes import messages as m
from thalweg.engine.processes.ipc import end_with_parent
from thalweg.engine.start import Engine
from thalweg.errors import InvalidRequest, QueueTimeout, ThalwegError

STATS_INTERVAL_S = 0.5
IDLE_POLL_MS = 500
ORDER_POLL_MS = 5  # while nothing runs and an order has not been obeyed
GATE_POLL_MS = 1  # while nothing runs and a grammar is being compiled


class EngineProcess:
    """Drives an engine from a socket. One bad message or request is answered; only a dead engine ends the loop."""

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        engine: Engine,
        queue_timeout_s: float | None = None,
    ) -> None:
        self._socket, self._core, self._queue_timeout_s = socket, engine.core, queue_timeout_s
        self._taken: list[RequestUpdate] = []  # of requests that were taken in, and whose front end has yet to be told
        self._queued: dict[str, float] = {}  # when each must have a slot, in order of arrival; may name ended ones
        self._orders: list[tuple[int, Future[Any]]] = []  # that were given, by the id of the question
        self._gate = GrammarGate(engine.grammars, self._add, self._refuse)
        self._engine, self._lock_step = engine, engine.lock_step

    def run(self) -> None:
        """Until Stop. Raises what ended the engine otherwise."""
        last_sent = time.monotonic()
        while True:
            if self._lock_step is not None:
                self._lock_step.busy = self._core.has_work() or bool(self._gate.waiting)
            while self._socket.poll(self._patience_ms()):
                message = m.decode_to_engine(self._socket.recv())
                if isinstance(message, m.Stop):
                    return
                self._take(message)
            self._gate.poll()
            if self._orders:
                self._tell_outcomes()
            if self._taken:
                self._send(self._taken)
                self._taken = []
            if self._queued:
                self._drop_late()
            updates: list[RequestUpdate] = []
            if self._core.has_work():
                updates = self._core.step()
            else:
                self._core.check()
                if not self._gate.waiting:
                    continue
            # A long prefill gives no updates, nor does a grammar; figures should still be seen, and that this lives.
            if updates or time.monotonic() - last_sent > STATS_INTERVAL_S:
                last_sent = time.monotonic()
                self._send(updates)

    def _patience_ms(self) -> int:
        """With work at hand only what is already there is read; otherwise wait for it, with a look at the ranks."""
        if self._core.has_work():
            return 0
        if self._orders:
            return ORDER_POLL_MS
        return GATE_POLL_MS if self._gate.waiting else IDLE_POLL_MS

    def _take(self, message: m.ToEngine) -> None:
        if isinstance(message, m.Add):
            if self._lock_step is not None:
                self._lock_step.busy = True  # before the wake-up
                self._engine.wake(message.wake)
            for request in message.requests:
                self._gate.take(request)
        elif isinstance(message, m.Abort):
            for request_id in message.request_ids:
                self._gate.abort(request_id)
                self._core.abort(request_id)
                self._queued.pop(request_id, None)
            # No update tells of the end of an aborted request, so what it freed is told here.
            self._send([])
        elif isinstance(message, m.Wake):
            self._engine.wake(message.number)
        elif isinstance(message, m.Keep):
            kept = self._core.keep(message.name, message.salt, message.token_ids)
            self._socket.send(m.encode(m.Kept(message.id, kept)))
        elif isinstance(message, m.CountExperts):
            self._socket.send(m.encode(m.ExpertsCounted(message.id, self._engine.expert_counts())))
        elif isinstance(message, m.Give):
            wake = message.wake if self._lock_step is not None else None
            self._orders.append((message.id, self._engine.order(message.order, wake)))
        elif isinstance(message, m.Release):
            self._core.release(message.name)

    def _drop_late(self) -> None:
        """Refuse what has waited too long. The queue is first in, first out, so its head is the one to look at."""
        now, dropped = time.monotonic(), False
        while self._queued:
            request_id, deadline = next(iter(self._queued.items()))
            if self._core.is_queued(request_id):
                if now < deadline:
                    break
                self._core.abort(request_id)
                reason = f"the request waited for {self._queue_timeout_s:g} s and was not begun (--queue-timeout)"
                self._refuse(request_id, QueueTimeout(reason))
                dropped = True
            del self._queued[request_id]
        if dropped:
            self._send([])

    def _tell_outcomes(self) -> None:
        for question_id, future in [each for each in self._orders if each[1].done()]:
            self._orders.remove((question_id, future))
            error = future.exception()
            if error is None:
                answer = m.Obeyed(question_id, future.result())
            else:
                kind = type(error).__name__
                reason = str(error) if isinstance(error, ThalwegError) else f"{kind}: {error}"
                answer = m.Obeyed(question_id, None, kind, reason)
            self._socket.send(m.encode(answer))

    def _send(self, updates: list[RequestUpdate]) -> None:
        self._socket.send(m.encode(m.Updates(updates, self._core.stats(), time.monotonic())))

    def _refuse(self, request_id: str, error: ThalwegError) -> None:
        self._socket.send(m.encode(m.Refused(request_id, type(error).__name__, str(error))))

    def _add(self, request: Request) -> None:
        try:
            self._core.add(request)
        except InvalidRequest as e:
            self._refuse(request.id, e)
        except Exception as e:  # noqa: BLE001 -- the others' requests go on
            sys.excepthook(*sys.exc_info())
            self._refuse(request.id, ThalwegError(f"the engine could not take the request in: {type(e).__name__}"))
        else:
            self._taken.append(RequestUpdate(request.id, []))  # it can wait
            if self._queue_timeout_s is not None:
                self._queued[request.id] = time.monotonic() + self._queue_timeout_s


def main(address: str) -> int:
    end_with_parent(address)
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 2000)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.bind(address)
    engine, failed = None, False
    try:
        start = m.decode_to_engine(socket.recv())
        if not isinstance(start, m.Start):
            raise ThalwegError(f"the first message is {type(start).__name__}; expected Start")
        if start.debug:
            logging.basicConfig(format="%(levelname)s:    %(message)s")
            logging.getLogger("thalweg").setLevel(logging.DEBUG)
        folder = Path(address.removeprefix("ipc://")).parent
        listener = None if start.listener is None else sockets.socket(fileno=start.listener)
        engine = Engine(EngineConfig(**start.config), folder, start.data_rank, start.data_meeting, listener)
        socket.send(m.encode(m.Ready(engine.info)))
        EngineProcess(socket, engine, start.queue_timeout).run()
    except Exception as e:  # noqa: BLE001 -- the front end must hear of whatever it was
        kind = type(e).__name__
        with contextlib.suppress(zmq.ZMQError):
            socket.send(m.encode(m.Dead(kind, str(e) if isinstance(e, ThalwegError) else f"{kind}: {e}")))
        if not isinstance(e, ThalwegError):
            sys.excepthook(*sys.exc_info())
        failed = True
        return 2
    finally:
        if engine is not None:
            engine.close(save=not failed)
        socket.close()
        zmq.Context.instance().term()
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stderr.flush()
    os._exit(code)  # a thread stuck in a collective must not keep the process
