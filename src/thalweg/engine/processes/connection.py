"""One engine process as the front end sees it: started, spoken to over a socket, ended."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from thalweg.assembly.info import EngineInfo
from thalweg.engine.processes import messages as m
from thalweg.engine.processes.ipc import address, end_group, tell_to_leave
from thalweg.engine.processes.questions import same_error
from thalweg.errors import EngineDeadError, ThalwegError


async def all_ready(engines: Sequence[Connection], start: m.Start) -> EngineInfo:
    """Have all engines start, and wait until they are ready; what the first one says of itself. Raises the first error
    of any."""
    starts = [asyncio.ensure_future(e.ready(msgspec.structs.replace(start, data_rank=e.rank))) for e in engines]
    try:
        return (await asyncio.gather(*starts))[0]
    finally:
        for each in starts:
            each.cancel()
        await asyncio.gather(*starts, return_exceptions=True)


class Connection:
    """A process that is started at once, for one asyncio loop. Its sockets lie in `folder`."""

    def __init__(self, context: zmq.asyncio.Context, folder: Path, rank: int, ranks: int) -> None:
        self.rank = rank
        self.name = "the engine process" + (f" of data-parallel rank {rank}" if ranks > 1 else "")
        where = address(folder, f"engine-{rank}" if rank else "engine")
        self._socket = context.socket(zmq.PAIR)
        for option, value in ((zmq.LINGER, 0), (zmq.SNDHWM, 0), (zmq.RCVHWM, 0)):
            self._socket.setsockopt(option, value)
        # The engine binds and this side connects: what is sent before the engine is there waits, and nobody for it.
        self._socket.connect(where)
        # stdin stays open as long as this process lives: its end tells the engine to leave.
        command = [sys.executable, "-m", "thalweg.engine.processes.main", where]
        # A session of its own: Ctrl-C in a terminal is for this process, which then ends the engine.
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
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
        """Wait until the engine is ready. Raises what it could not start for."""
        await self._socket.send(m.encode(start))
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
        if isinstance(message, m.Ready):
            return message.info
        error: ThalwegError = EngineDeadError(f"{self.name} ended before it was ready; its lines above say why")
        if isinstance(message, m.Dead):
            error = same_error(message.kind, message.reason, EngineDeadError)
        raise error

    def post(self, message: m.ToEngine) -> None:
        """Send without waiting, so that cancelled tasks can too. The queue has no limit; a dead engine gets nothing."""
        sent: Any = self._socket.send(m.encode(message), zmq.NOBLOCK)
        if sent.done():
            sent.exception()  # looked at, so that asyncio does not report it as forgotten

    async def receive(self) -> m.FromEngine:
        return m.decode_from_engine(await self._socket.recv())

    async def exit_code(self) -> int:
        """Of the process, once it has ended."""
        return await asyncio.shield(self._exit)

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
