"""The engine process: `python -m thalweg.engine.process ADDRESS`, started by EngineClient. Messages in, updates out."""

from __future__ import annotations

import contextlib
import os
import sys
import time

import zmq

from thalweg.config.engine import EngineConfig
from thalweg.core import Request
from thalweg.engine import messages as m
from thalweg.engine.gate import GrammarGate
from thalweg.engine.ranks import end_with_parent
from thalweg.engine.start import Engine
from thalweg.errors import InvalidRequest, ThalwegError

STATS_INTERVAL_S = 0.5
IDLE_POLL_MS = 500
GATE_POLL_MS = 1  # while nothing runs and a grammar is being compiled


class EngineProcess:
    """Drives an engine from a socket. One bad message or request is answered; only a dead engine ends the loop."""

    def __init__(self, socket: zmq.Socket[bytes], engine: Engine) -> None:
        self._socket, self._engine, self._core = socket, engine, engine.core
        self._gate = GrammarGate(engine.grammars, self._add, self._refuse)

    def run(self) -> None:
        """Until Stop. Raises what ended the engine otherwise."""
        last_sent = time.monotonic()
        while True:
            # With work at hand only what is already there is read; otherwise wait for it, with a look at the ranks.
            idle_ms = GATE_POLL_MS if self._gate.waiting else IDLE_POLL_MS
            while self._socket.poll(0 if self._core.has_work() else idle_ms):
                message = m.decode_to_engine(self._socket.recv())
                if isinstance(message, m.Stop):
                    return
                self._take(message)
            self._gate.poll()
            if not self._core.has_work():
                self._core.check()
                continue
            updates = self._core.step()
            # A long prefill gives no updates; its figures should still be seen.
            if updates or time.monotonic() - last_sent > STATS_INTERVAL_S:
                last_sent = time.monotonic()
                self._socket.send(m.encode(m.Updates(updates, self._core.stats())))

    def _take(self, message: m.ToEngine) -> None:
        if isinstance(message, m.Add):
            self._gate.take(message.request)
        elif isinstance(message, m.Abort):
            for request_id in message.request_ids:
                self._gate.abort(request_id)
                self._core.abort(request_id)
            # No update tells of the end of an aborted request, so what it freed is told here.
            self._socket.send(m.encode(m.Updates([], self._core.stats())))

    def _add(self, request: Request) -> None:
        try:
            self._core.add(request)
        except InvalidRequest as e:
            self._refuse(request.id, str(e))

    def _refuse(self, request_id: str, reason: str) -> None:
        self._socket.send(m.encode(m.Refused(request_id, reason)))


def main(address: str) -> int:
    end_with_parent()
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 2000)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.bind(address)
    engine = None
    try:
        start = m.decode_to_engine(socket.recv())
        if not isinstance(start, m.Start):
            raise ThalwegError(f"the first message is {type(start).__name__}; expected Start")
        engine = Engine(EngineConfig(**start.config))
        socket.send(m.encode(m.Ready(engine.info)))
        EngineProcess(socket, engine).run()
    except Exception as e:  # noqa: BLE001 -- the front end must hear of whatever it was
        kind = type(e).__name__
        with contextlib.suppress(zmq.ZMQError):
            socket.send(m.encode(m.Dead(kind, str(e) if isinstance(e, ThalwegError) else f"{kind}: {e}")))
        if not isinstance(e, ThalwegError):
            sys.excepthook(*sys.exc_info())
        return 2
    finally:
        if engine is not None:
            engine.close()
        socket.close()
        zmq.Context.instance().term()
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stderr.flush()
    os._exit(code)  # a thread stuck in a collective must not keep the process
