"""The front end's side of the engine process: starts it, sends requests, hands each one its updates."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import subprocess
import sys
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import zmq
import zmq.asyncio

import thalweg.errors as errors
from thalweg.config.engine import EngineConfig
from thalweg.core import Request, RequestUpdate, SamplingParams, SchedulerStats
from thalweg.engine import messages as m
from thalweg.engine.front import Front, load_front
from thalweg.engine.info import EngineInfo
from thalweg.engine.ipc import socket_folder
from thalweg.engine.output import Delta, OutputProcessor
from thalweg.engine.prompts import check_params, check_token_ids
from thalweg.errors import EngineDeadError, InvalidRequest, ThalwegError


class EngineClient:
    """An engine in a process of its own, for one asyncio loop. `start`, then `generate` as often as wanted, `close`.

    When the engine dies every request under way, and every later one, raises EngineDeadError.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.front: Front = load_front(config)  # refuses a bad folder before a process is started
        self.info: EngineInfo
        self.stats: SchedulerStats | None = None
        self.dead: EngineDeadError | None = None
        self._queues: dict[str, asyncio.Queue[Delta | ThalwegError]] = {}
        self._ids = itertools.count()
        self._closing = False
        self._process: subprocess.Popen[bytes] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start the process and wait until it is ready. Raises what the engine could not start for."""
        self._folder = socket_folder()
        address = f"ipc://{self._folder.name}/engine"
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        for option, value in ((zmq.LINGER, 0), (zmq.SNDHWM, 0), (zmq.RCVHWM, 0)):
            self._socket.setsockopt(option, value)
        # The engine binds and this side connects: what is sent before the engine is there waits, and nobody for it.
        self._socket.connect(address)
        # stdin stays open as long as this process lives: its end tells the engine to leave.
        command = [sys.executable, "-m", "thalweg.engine.process", address]
        # A session of its own: Ctrl-C in a terminal is for this process, which then ends the engine.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        self._exit = asyncio.ensure_future(asyncio.to_thread(self._process.wait))
        await self._socket.send(m.encode(m.Start(self.config.to_dict())))
        receive = asyncio.ensure_future(self._socket.recv())
        await asyncio.wait([receive, self._exit], return_when=asyncio.FIRST_COMPLETED)
        if not receive.done():
            # The process ended; what it sent before may still be on its way.
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(receive), 1.0)
        message = m.decode_from_engine(receive.result()) if receive.done() else None
        if isinstance(message, m.Ready):
            self.info = message.info
            self._outputs = OutputProcessor(self.front.tokenizer, frozenset(self.info.eos_token_ids))
            self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._watch())]
            return
        receive.cancel()
        error: ThalwegError = EngineDeadError("the engine process ended before it was ready; its lines above say why")
        if isinstance(message, m.Dead):
            error = _same_error(message)
        self._closing = True
        await self._end_process()
        raise error

    async def generate(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        request_id: str | None = None,
        marks: Mapping[int, str] | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """Each step's news of one request, to its end. Leaving early aborts it. `marks`: see OutputProcessor.add.

        Raises InvalidRequest when the engine refuses it, EngineDeadError when the engine is or gets lost.
        """
        if self.dead is not None:
            raise self.dead
        check_token_ids(prompt_token_ids, self.info.vocab_size)
        check_params(params, self.front.tokenizer, self.info.vocab_size)
        request_id = f"{next(self._ids)}" if request_id is None else request_id
        if request_id in self._queues:
            raise InvalidRequest(f"request id {request_id!r} is in use; expected a new one")
        request = Request(id=request_id, prompt_token_ids=prompt_token_ids, params=params)
        queue: asyncio.Queue[Delta | ThalwegError] = asyncio.Queue()
        self._queues[request_id] = queue
        self._outputs.add(request, marks)
        ended = False
        try:
            self._post(m.Add(request))
            while not ended:
                delta = await queue.get()
                if isinstance(delta, ThalwegError):
                    ended = True
                    raise delta
                # A stop string ends the request here; the engine has yet to be told.
                ended = delta.finish_reason is not None and not isinstance(delta.stop_reason, str)
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            del self._queues[request_id]
            self._outputs.discard(request_id)
            if not ended and self.dead is None and not self._closing:
                self._post(m.Abort([request_id]))

    async def close(self) -> None:
        """Stop the engine process, even while it starts. Requests under way end with EngineDeadError."""
        if self._closing or self._process is None:
            return
        self._closing = True
        if self._tasks:
            self._post(m.Stop())
        else:
            self._end_input(self._process)
        self._lose(EngineDeadError("the engine was closed"))
        for task in self._tasks:
            task.cancel()
        await self._end_process()

    def _post(self, message: m.ToEngine) -> None:
        """Send without waiting, so that cancelled tasks can too. The queue has no limit; a dead engine gets nothing,
        and its requests hear of that from `_lose`."""
        sent: Any = self._socket.send(m.encode(message), zmq.NOBLOCK)
        if sent.done():
            sent.exception()  # looked at, so that asyncio does not report it as forgotten

    async def _receive(self) -> None:
        while True:
            message = m.decode_from_engine(await self._socket.recv())
            if isinstance(message, m.Updates):
                self.stats = message.stats
                for update in message.updates:
                    self._take(update)
            elif isinstance(message, m.Refused):
                queue = self._queues.get(message.request_id)
                if queue is not None:
                    queue.put_nowait(InvalidRequest(message.reason))
            elif isinstance(message, m.Dead):
                self._lose(EngineDeadError(f"the engine died: {message.reason}"))

    def _take(self, update: RequestUpdate) -> None:
        queue = self._queues.get(update.request_id)
        if queue is None:
            self._outputs.discard(update.request_id)
            return
        try:
            delta = self._outputs.process(update)
        except Exception as e:  # noqa: BLE001 -- one request's text must not end the others'
            self._outputs.discard(update.request_id)
            self._post(m.Abort([update.request_id]))
            queue.put_nowait(ThalwegError(f"the output could not be decoded: {type(e).__name__}: {e}"))
            return
        if delta is not None:
            queue.put_nowait(delta)

    async def _watch(self) -> None:
        code = await asyncio.shield(self._exit)
        await asyncio.sleep(0.1)  # its last message, which says more, goes first
        self._lose(EngineDeadError(f"the engine process ended with exit code {code}"))

    def _lose(self, error: EngineDeadError) -> None:
        self.dead = self.dead or error
        for queue in self._queues.values():
            queue.put_nowait(self.dead)

    async def _end_process(self, timeout_s: float = 10.0) -> None:
        process = self._process
        assert process is not None
        try:
            await asyncio.wait_for(asyncio.shield(self._exit), timeout_s)
        except TimeoutError:
            process.kill()
            await self._exit
        self._end_input(process)
        self._socket.close()
        self._context.term()
        self._folder.cleanup()

    @staticmethod
    def _end_input(process: subprocess.Popen[bytes]) -> None:
        """Has a process that is still there leave at once, whatever it is doing."""
        assert process.stdin is not None
        process.stdin.close()


def _same_error(message: m.Dead) -> ThalwegError:
    kind: Any = getattr(errors, message.kind, EngineDeadError)
    if not (isinstance(kind, type) and issubclass(kind, ThalwegError)):
        kind = EngineDeadError
    return kind(message.reason)
