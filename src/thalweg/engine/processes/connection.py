"""One engine process of this host as the front end sees it: started, spoken to over a socket, ended."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import zmq
import zmq.asyncio

from thalweg.assembly.info import EngineInfo
from thalweg.engine.processes import messages as m
from thalweg.engine.processes.ipc import address, end_group, tell_to_leave
from thalweg.engine.processes.questions import same_error
from thalweg.errors import EngineDeadError


class AnyEngine(Protocol):
    """An engine process as the front end sees it, wherever it runs."""

    rank: int

    async def ready(self, start: m.Start) -> EngineInfo:
        """Wait until the engine is ready. Raises what it could not start for."""

    def post(self, message: m.ToEngine) -> None:
        """Send without waiting, so that cancelled tasks can too. The queue has no limit; a dead engine gets nothing."""

    async def receive(self) -> m.FromEngine: ...

    async def end(self) -> str:
        """How the process ended, once it has."""


async def all_ready(engines: Sequence[AnyEngine], start: m.Start) -> EngineInfo:
    """Have all engines start, and wait until they are ready; what the first one says of itself. Raises the first error
    of any."""
    starts = [asyncio.ensure_future(e.ready(start)) for e in engines]
    try:
        return (await asyncio.gather(*starts))[0]
    finally:
        for each in starts:
            each.cancel()
        await asyncio.gather(*starts, return_exceptions=True)


def launched(
    context: zmq.Context[Any], folder: Path, rank: int, files: tuple[int, ...] = ()
) -> tuple[Any, subprocess.Popen[bytes]]:
    """A new engine process, which keeps these `files` open, and the socket to it, which lies in `folder`."""
    where = address(folder, f"engine-{rank}" if rank else "engine")
    socket = context.socket(zmq.PAIR)
    for option, value in ((zmq.LINGER, 0), (zmq.SNDHWM, 0), (zmq.RCVHWM, 0)):
        socket.setsockopt(option, value)
    # The engine binds and this side connects: what is sent before the engine is there waits, and nobody for it.
    socket.connect(where)
    # stdin stays open as long as this process lives: its end tells the engine to leave.
    command = [sys.executable, "-m", "thalweg.engine.processes.main", where]
    # A session of its own: Ctrl-C in a terminal is for this process, which then ends the engine.
    return socket, subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, pass_fds=files)


def engine_name(rank: int | None) -> str:
    """`rank`: of data-parallel ones."""
    return "the engine process" + ("" if rank is None else f" of data-parallel rank {rank}")


def information(message: m.FromEngine | None, name: str) -> EngineInfo:
    """Of an engine whose first message, if there was one, is this. Raises what it could not start for."""
    if isinstance(message, m.Ready):
        return message.info
    if isinstance(message, m.Dead):
        raise same_error(message.kind, message.reason, EngineDeadError)
    raise EngineDeadError(f"{name} ended before it was ready; its lines above say why")


class Connection:
    """A process of this host that is started at once, for one asyncio loop. Its sockets lie in `folder`. It is given
    `listener`, if there is one (see Start)."""

    def __init__(
        self, context: zmq.asyncio.Context, folder: Path, rank: int, ranks: int, listener: int | None = None
    ) -> None:
        self.rank, self._listener = rank, listener
        self.name = engine_name(rank if ranks > 1 else None)
        self._socket, self.process = launched(context, folder, rank, () if listener is None else (listener,))
        loop = asyncio.get_running_loop()
        self._exit: asyncio.Future[int] = loop.create_future()
        # A thread of its own: asyncio has a few more than there are processors, and engines would take all of them.
        threading.Thread(target=self._wait, args=(loop,), name="thalweg-engine-watch", daemon=True).start()

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        code = self.process.wait()
        end_group(self.process.pid)  # of ranks that hang
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(self._exit.set_result, code)

    async def ready(self, start: m.Start) -> EngineInfo:
        own = msgspec.structs.replace(start, data_rank=self.rank, listener=self._listener)
        await self._socket.send(m.encode(own))
        receive = asyncio.ensure_future(self._socket.recv())
        try:
            either: list[asyncio.Future[Any]] = [receive, self._exit]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not receive.done():
                # The process ended; what it sent before may still be on its way.
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(asyncio.shield(receive), 1.0)
            message = m.decode_from_engine(receive.result()) if receive.done() else None
        finally:
            receive.cancel()
        return information(message, self.name)

    def post(self, message: m.ToEngine) -> None:
        sent: Any = self._socket.send(m.encode(message), zmq.NOBLOCK)
        if sent.done():
            sent.exception()  # looked at, so that asyncio does not report it as forgotten

    async def receive(self) -> m.FromEngine:
        return m.decode_from_engine(await self._socket.recv())

    async def end(self) -> str:
        code = await asyncio.shield(self._exit)
        await asyncio.sleep(0.1)  # its last message, which says more, goes first
        return f"{self.name} ended with exit code {code}"

    def leave(self) -> None:
        """Have the process leave at once, whatever it is doing."""
        tell_to_leave(self.process)

    async def close(self, timeout_s: float = 10.0) -> None:
        """Wait for the end of a process that was told to stop or leave; kill it after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._exit), timeout_s)
        end_group(self.process.pid)
        await self._exit
        self.leave()
        self._socket.close()
