"""The front end's side of the engine process: starts it, sends requests, hands each one its updates."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from thalweg.assembly.info import EngineInfo
from thalweg.config.engine import EngineConfig
from thalweg.core import Request, RequestUpdate, SamplingParams, SchedulerStats
from thalweg.engine.processes import messages as m
from thalweg.engine.processes.ipc import SocketFolder, address, end_group, tell_to_leave
from thalweg.engine.processes.questions import Question, Questions, same_error
from thalweg.errors import EngineDeadError, InvalidRequest, RequestTimeout, ThalwegError
from thalweg.scheduler.scheduler import check_prompt_length
from thalweg.text.codec import TextCodec, load_codec
from thalweg.text.output import Delta, OutputProcessor, TextReader
from thalweg.text.prompts import check_params, check_token_ids

MAX_UNREAD = 16_384  # updates that may wait for whoever asked for them
SAVE_SECONDS = 900.0  # that an engine may take to end when it writes its cache to --cache-folder
SILENCE = 1.5  # step timeouts without a word after which an engine that has work is taken to hang


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Seconds a request may wait for its slot, and may take in all. None: as long as it wants."""

    queue_timeout: float | None = None
    request_timeout: float | None = None


class EngineClient:
    """An engine in a process of its own, for one asyncio loop. `start`, then `generate` as often as wanted, `close`.

    When the engine dies, or says nothing for longer than a step may take, every request under way, and every later
    one, raises EngineDeadError.
    """

    def __init__(
        self,
        config: EngineConfig,
        limits: RequestLimits | None = None,
        profiler: m.ProfilerOptions | None = None,
        debug: bool = False,
    ) -> None:
        """With `debug` the engine process says on standard error what it decides, such as why a prefix is not used."""
        self.config, self._limits, self.profiler, self._debug = config, limits or RequestLimits(), profiler, debug
        self.codec: TextCodec = load_codec(config)  # refuses a bad folder before a process is started
        self.info: EngineInfo
        self.stats: SchedulerStats | None = None
        self.dead: EngineDeadError | None = None  # why no request is served any more
        self.died: EngineDeadError | None = None  # the same, if that was not asked for
        self._queues: dict[str, asyncio.Queue[Delta | ThalwegError]] = {}
        self._questions = Questions()
        self._ids = itertools.count()
        self._heard = 0.0  # when the engine last said something, or was given work while it had none
        self._closing = False
        self._process: subprocess.Popen[bytes] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start the process and wait until it is ready. Raises what the engine could not start for."""
        self._folder = SocketFolder()
        where = address(self._folder.path, "engine")
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        for option, value in ((zmq.LINGER, 0), (zmq.SNDHWM, 0), (zmq.RCVHWM, 0)):
            self._socket.setsockopt(option, value)
        # The engine binds and this side connects: what is sent before the engine is there waits, and nobody for it.
        self._socket.connect(where)
        # stdin stays open as long as this process lives: its end tells the engine to leave.
        command = [sys.executable, "-m", "thalweg.engine.processes.main", where]
        # A session of its own: Ctrl-C in a terminal is for this process, which then ends the engine.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        self._exit = asyncio.ensure_future(asyncio.to_thread(self._process.wait))
        options = self._limits.queue_timeout, self.profiler, self._debug
        await self._socket.send(m.encode(m.Start(self.config.to_dict(), *options)))
        receive = asyncio.ensure_future(self._socket.recv())
        await asyncio.wait([receive, self._exit], return_when=asyncio.FIRST_COMPLETED)
        if not receive.done():
            # The process ended; what it sent before may still be on its way.
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(receive), 1.0)
        message = m.decode_from_engine(receive.result()) if receive.done() else None
        if isinstance(message, m.Ready):
            self.info = message.info
            self._outputs = OutputProcessor(self.codec.tokenizer, frozenset(self.info.eos_token_ids))
            work = (self._receive(), self._watch_process(), self._watch_silence())
            self._tasks = [asyncio.create_task(each) for each in work]
            return
        receive.cancel()
        error: ThalwegError = EngineDeadError("the engine process ended before it was ready; its lines above say why")
        if isinstance(message, m.Dead):
            error = same_error(message.kind, message.reason, EngineDeadError)
        self._closing = True
        await self._end_process()
        raise error

    async def generate(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        request_id: str | None = None,
        reader: TextReader | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """Each step's news of one request, to its end; the first has nothing but that the engine took it in. Leaving
        early aborts it. `reader`: see OutputProcessor.add.

        Raises InvalidRequest when the engine refuses it, QueueTimeout or RequestTimeout when it takes too long,
        EngineDeadError when the engine is or gets lost.
        """
        if self.dead is not None:
            raise self.dead
        # Here too, so that a prompt that is far too long does not hold up the engine.
        check_prompt_length(len(prompt_token_ids), params, self.info.max_model_len)
        check_token_ids(prompt_token_ids, self.info.vocab_size)
        check_params(params, self.codec.tokenizer, self.info.vocab_size)
        request_id = f"{next(self._ids)}" if request_id is None else request_id
        if request_id in self._queues:
            raise InvalidRequest(f"request id {request_id!r} is in use; expected a new one")
        request = Request(id=request_id, prompt_token_ids=prompt_token_ids, params=params)
        queue: asyncio.Queue[Delta | ThalwegError] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        if not self._outputs.waiting:
            self._heard = loop.time()
        self._queues[request_id] = queue
        timer = None
        if (seconds := self._limits.request_timeout) is not None:
            late = RequestTimeout(f"the request has not ended after {seconds:g} s (--request-timeout)")
            timer = loop.call_later(seconds, self._give_up, request_id, late)
        ended = False
        try:
            self._outputs.add(request, reader)
            self._post(m.Add(request))
            while not ended:
                delta = await queue.get()
                if isinstance(delta, ThalwegError):
                    ended = True
                    raise delta
                ended = delta.finish_reason is not None
                yield delta
        finally:
            if timer is not None:
                timer.cancel()
            del self._queues[request_id]
            self._outputs.discard(request_id)
            if not ended and self.dead is None and not self._closing:
                self._post(m.Abort([request_id]))

    async def start_profile(self, num_steps: int | None = None) -> None:
        """Record the steps from the next one on. Only with `profiler` options.

        Raises ProfileConflict if a recording is under way, InvalidRequest for too many steps, RequestTimeout if the
        engine does not answer, EngineDeadError.
        """
        await self._ask(lambda question_id: m.StartProfile(question_id, num_steps))

    async def stop_profile(self) -> m.Trace:
        """End the recording, or take the trace of the last one if it ended by itself. Raises as start_profile, and
        ThalwegError if the trace could not be written."""
        trace: m.Trace = await self._ask(m.StopProfile)
        return trace

    async def keep(self, name: str, salt: str, token_ids: list[int]) -> int:
        """As EngineCore.keep. Raises EngineDeadError, or RequestTimeout if the engine does not answer."""
        kept: int = await self._ask(lambda question_id: m.Keep(question_id, name, salt, token_ids))
        return kept

    def release(self, name: str) -> None:
        """As EngineCore.release."""
        if self.dead is None and not self._closing:
            self._post(m.Release(name))

    async def _ask(self, make: Callable[[int], Question]) -> Any:
        if self.dead is not None:
            raise self.dead
        return await self._questions.ask(self._post, make)

    async def close(self) -> None:
        """Stop the engine process, even while it starts. Requests under way end with EngineDeadError."""
        if self._closing or self._process is None:
            return
        self._closing = True
        if self._tasks:
            self._post(m.Stop())
        else:
            tell_to_leave(self._process)
        self._lose(EngineDeadError("the engine was closed"))
        for task in self._tasks:
            task.cancel()
        # It may have a cache to write down first.
        await self._end_process(10.0 if self.config.cache_folder is None else SAVE_SECONDS)

    def _post(self, message: m.ToEngine) -> None:
        """Send without waiting, so that cancelled tasks can too. The queue has no limit; a dead engine gets nothing,
        and its requests hear of that from `_lose`."""
        sent: Any = self._socket.send(m.encode(message), zmq.NOBLOCK)
        if sent.done():
            sent.exception()  # looked at, so that asyncio does not report it as forgotten

    async def _receive(self) -> None:
        while True:
            message = m.decode_from_engine(await self._socket.recv())
            self._heard = asyncio.get_running_loop().time()
            if isinstance(message, m.Updates):
                if self.died is None:
                    self.stats = message.stats
                for update in message.updates:
                    self._take(update, message.sent_at)
            elif isinstance(message, m.Refused):
                self._outputs.discard(message.request_id)
                queue = self._queues.get(message.request_id)
                if queue is not None:
                    queue.put_nowait(same_error(message.kind, message.reason, InvalidRequest))
            elif isinstance(message, m.Profiled | m.Kept):
                self._questions.take(message)
            elif isinstance(message, m.Dead):
                self._die(f"the engine died: {message.reason}")

    def _take(self, update: RequestUpdate, sent_at: float) -> None:
        queue = self._queues.get(update.request_id)
        if queue is None:
            self._outputs.discard(update.request_id)
            return
        try:
            delta = self._outputs.process(update)
        except Exception as e:  # noqa: BLE001 -- one request's text must not end the others'
            self._give_up(update.request_id, ThalwegError(f"the output could not be decoded: {type(e).__name__}: {e}"))
            return
        if delta is not None:
            if isinstance(delta.stop_reason, str):
                self._post(m.Abort([update.request_id]))  # a stop string ends it here; the engine has yet to be told
            delta.sent_at = sent_at
            queue.put_nowait(delta)
            if queue.qsize() > MAX_UNREAD:
                self._give_up(
                    update.request_id, RequestTimeout(f"{MAX_UNREAD} updates wait to be read; read the answer faster")
                )

    def _give_up(self, request_id: str, error: ThalwegError) -> None:
        """End one request here and in the engine; whoever asked for it hears `error`."""
        self._outputs.discard(request_id)
        self._post(m.Abort([request_id]))
        self._queues[request_id].put_nowait(error)

    def end_requests(self, reason: str) -> None:
        """End every request under way with EngineDeadError, and refuse those to come; for a server that must stop."""
        self._lose(EngineDeadError(reason))

    async def _watch_silence(self) -> None:
        allowed, loop = SILENCE * self.config.step_timeout, asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(1.0, allowed / 4))
            # Answers that are done and not yet read do not concern the engine.
            if self._outputs.waiting and loop.time() - self._heard > allowed:
                assert self._process is not None
                self._die(f"the engine has said nothing for {allowed:g} s; it hangs (--step-timeout)")
                self._process.kill()
                return

    async def _watch_process(self) -> None:
        code = await asyncio.shield(self._exit)
        await asyncio.sleep(0.1)  # its last message, which says more, goes first
        self._die(f"the engine process ended with exit code {code}")

    def _die(self, reason: str) -> None:
        """The engine is gone, and what it held with it."""
        self.died = self.died or EngineDeadError(reason)
        if self.stats is not None:
            self.stats = msgspec.structs.replace(self.stats, num_running=0, num_waiting=0, blocks_used=0, slots_used=0)
        self._lose(self.died)

    def _lose(self, error: EngineDeadError) -> None:
        self.dead = self.dead or error
        for queue in self._queues.values():
            queue.put_nowait(self.dead)
        self._questions.lose(self.dead)

    async def _end_process(self, timeout_s: float = 10.0) -> None:
        process = self._process
        assert process is not None
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._exit), timeout_s)
        end_group(process.pid)
        await self._exit
        tell_to_leave(process)
        self._socket.close()
        self._context.term()
        self._folder.cleanup()
