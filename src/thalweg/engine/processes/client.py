"""The front end's side of the engine processes: starts them, sends requests, hands each one its updates."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

import zmq.asyncio

from thalweg.assembly.info import EngineInfo
from thalweg.config.engine import EngineConfig
from thalweg.core import Request, RequestUpdate, SamplingParams, SchedulerStats
from thalweg.engine.processes import messages as m
from thalweg.engine.processes.balance import Balance, ended, together
from thalweg.engine.processes.connection import Connection, all_ready
from thalweg.engine.processes.ipc import SocketFolder
from thalweg.engine.processes.questions import Question, Questions, same_error
from thalweg.errors import ConfigError, EngineDeadError, InvalidRequest, RequestTimeout, ThalwegError
from thalweg.scheduler.scheduler import check_prompt_length
from thalweg.text.codec import TextCodec, load_codec
from thalweg.text.output import Delta, OutputProcessor, TextReader
from thalweg.text.prompts import check_params, check_token_ids

MAX_UNREAD = 16_384  # updates that may wait for whoever asked for them
SAVE_SECONDS = 900.0  # that an engine may take to end when it writes its cache to --cache-folder
LEAVE_SECONDS = 2.0  # for an engine to leave that was told to, unless it hangs
SILENCE = 1.5  # step timeouts without a word after which an engine that has work is taken to hang


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Seconds a request may wait for its slot, and may take in all. None: as long as it wants."""

    queue_timeout: float | None = None
    request_timeout: float | None = None


class EngineClient:
    """An engine in a process of its own, for one asyncio loop. `start`, then `generate` as often as wanted, `close`.

    With --data-parallel-size there are several, one for each rank, and each request goes to the one with the least to
    do. When an engine dies, or says nothing for longer than a step may take, every request under way, and every later
    one, raises EngineDeadError.
    """

    def __init__(
        self,
        config: EngineConfig,
        limits: RequestLimits | None = None,
        profiler: m.ProfilerOptions | None = None,
        debug: bool = False,
    ) -> None:
        """With `debug` the engine process says on standard error what it decides, such as why a prefix is not used.
        Raises ConfigError, as load_codec does."""
        if profiler is not None and config.data_parallel_size > 1:
            size = f"--data-parallel-size is {config.data_parallel_size}"
            raise ConfigError(f"{size}, and --enable-profiler records one rank's steps; leave one of them out")
        self.config, self._limits, self.profiler, self._debug = config, limits or RequestLimits(), profiler, debug
        self.codec: TextCodec = load_codec(config)  # refuses a bad folder before a process is started
        self.info: EngineInfo
        self.rank_stats: dict[int, SchedulerStats] = {}  # what each rank last said
        self.dead: EngineDeadError | None = None  # why no request is served any more
        self.died: EngineDeadError | None = None  # the same, if that was not asked for
        self._queues: dict[str, asyncio.Queue[Delta | ThalwegError]] = {}
        self._questions = Questions()
        self._ids = itertools.count()
        ranks = config.data_parallel_size
        self._heard = [0.0] * ranks  # when each engine last said something, or was given work while it had none
        self._wakes = 0  # wake-ups that were sent to every rank
        self._closing = False
        self.engines: list[Connection] = []
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def stats(self) -> SchedulerStats | None:
        """Of all ranks together; None before any has said something."""
        return together(self.rank_stats.values()) if self.rank_stats else None

    async def start(self) -> None:
        """Start the processes and wait until all are ready. Raises what an engine could not start for."""
        self._folder = SocketFolder()
        self._context = zmq.asyncio.Context()
        ranks = range(self.config.data_parallel_size)
        self.engines = [Connection(self._context, self._folder.path, rank, len(ranks)) for rank in ranks]
        start = m.Start(self.config.to_dict(), self._limits.queue_timeout, self.profiler, self._debug)
        try:
            self.info = await all_ready(self.engines, start)
        except Exception:
            self._closing = True
            await self._end_processes(leave=len(ranks) > 1)  # one alone ends by itself
            raise
        self._balance = Balance(len(ranks))
        self._outputs = OutputProcessor(self.codec.tokenizer, frozenset(self.info.eos_token_ids))
        watching = [work for e in self.engines for work in (self._receive(e), self._watch_process(e))]
        self._tasks = [asyncio.create_task(work) for work in (*watching, self._watch_silence())]

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
        self._queues[request_id] = queue
        timer = None
        if (seconds := self._limits.request_timeout) is not None:
            late = RequestTimeout(f"the request has not ended after {seconds:g} s (--request-timeout)")
            timer = loop.call_later(seconds, self._give_up, request_id, late)
        ended = False
        try:
            self._outputs.add(request, reader)
            self._add(request)
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
                self._abort(request_id)
            self._balance.forget(request_id)

    def _add(self, request: Request) -> None:
        rank = self._balance.add(request)
        if self._balance.requests[rank] == 1:
            self._heard[rank] = asyncio.get_running_loop().time()
        if len(self.engines) == 1:
            self.engines[0].post(m.Add(request))
            return
        self._wakes += 1
        for engine in self.engines:
            engine.post(m.Add(request, self._wakes) if engine.rank == rank else m.Wake(self._wakes))

    def _abort(self, request_id: str) -> None:
        """Have the engine end a request, without further updates."""
        self._balance.end(request_id)
        if (rank := self._balance.rank_of(request_id)) is not None:
            self.engines[rank].post(m.Abort([request_id]))

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

    async def expert_counts(self) -> dict[int, list[int]]:
        """Tokens that each expert got, by layer, over all data-parallel ranks since this was first asked. Raises as
        keep."""
        if not self._tasks:
            return {}  # engines that start expect Start first
        ranks = await asyncio.gather(*(self._ask(m.CountExperts, engine) for engine in self.engines))
        return {layer: [sum(n) for n in zip(*(rank[layer] for rank in ranks), strict=True)] for layer in ranks[0]}

    async def keep(self, name: str, salt: str, token_ids: list[int]) -> int:
        """As EngineCore.keep, on every rank; the most that one of them has. Raises EngineDeadError, or RequestTimeout
        if the engine does not answer."""
        make = lambda question_id: m.Keep(question_id, name, salt, token_ids)  # noqa: E731
        kept: list[int] = await asyncio.gather(*(self._ask(make, engine) for engine in self.engines))
        return max(kept)

    def release(self, name: str) -> None:
        """As EngineCore.release."""
        for engine in self.engines if self.dead is None and not self._closing else ():
            engine.post(m.Release(name))

    async def _ask(self, make: Callable[[int], Question], engine: Connection | None = None) -> Any:
        if self.dead is not None:
            raise self.dead
        return await self._questions.ask((engine or self.engines[0]).post, make)

    async def close(self) -> None:
        """Stop the engine processes, even while they start. Requests under way end with EngineDeadError."""
        if self._closing or not self.engines:
            return
        self._closing = True
        started = bool(self._tasks)
        for engine in self.engines if started else ():
            engine.post(m.Stop())
        self._lose(EngineDeadError("the engine was closed"))
        for task in self._tasks:
            task.cancel()
        # It may have a cache to write down first.
        seconds = 10.0 if self.config.cache_folder is None else SAVE_SECONDS
        await self._end_processes(seconds, leave=not started or (len(self.engines) > 1 and self.died is not None))

    async def _receive(self, engine: Connection) -> None:
        while True:
            message = await engine.receive()
            self._heard[engine.rank] = asyncio.get_running_loop().time()
            if isinstance(message, m.Updates):
                if self.died is None:
                    self.rank_stats[engine.rank] = message.stats
                for update in message.updates:
                    self._take(update, message.sent_at)
            elif isinstance(message, m.Refused):
                self._outputs.discard(message.request_id)
                self._balance.end(message.request_id)
                queue = self._queues.get(message.request_id)
                if queue is not None:
                    queue.put_nowait(same_error(message.kind, message.reason, InvalidRequest))
            elif isinstance(message, m.Profiled | m.Kept | m.ExpertsCounted):
                self._questions.take(message)
            elif isinstance(message, m.Dead):
                self._die(f"the engine died: {message.reason}")

    def _take(self, update: RequestUpdate, sent_at: float) -> None:
        self._balance.came(update.request_id, len(update.token_ids))
        if update.finish_reason is not None:
            self._balance.end(update.request_id)
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
                self._abort(update.request_id)  # a stop string ends it here; the engine has yet to be told
            delta.sent_at = sent_at
            queue.put_nowait(delta)
            if queue.qsize() > MAX_UNREAD:
                self._give_up(
                    update.request_id, RequestTimeout(f"{MAX_UNREAD} updates wait to be read; read the answer faster")
                )

    def _give_up(self, request_id: str, error: ThalwegError) -> None:
        """End one request here and in the engine; whoever asked for it hears `error`."""
        self._outputs.discard(request_id)
        self._abort(request_id)
        self._queues[request_id].put_nowait(error)

    def end_requests(self, reason: str) -> None:
        """End every request under way with EngineDeadError, and refuse those to come; for a server that must stop."""
        self._lose(EngineDeadError(reason))

    async def _watch_silence(self) -> None:
        allowed, loop = SILENCE * self.config.step_timeout, asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(1.0, allowed / 4))
            # Answers that are done and not yet read do not concern the engine.
            for engine in self.engines:
                if self._balance.requests[engine.rank] and loop.time() - self._heard[engine.rank] > allowed:
                    self._die(f"the engine has said nothing for {allowed:g} s; it hangs (--step-timeout)")
                    engine.process.kill()
                    return

    async def _watch_process(self, engine: Connection) -> None:
        code = await engine.exit_code()
        await asyncio.sleep(0.1)  # its last message, which says more, goes first
        self._die(f"{engine.name} ended with exit code {code}")

    def _die(self, reason: str) -> None:
        """The engine is gone, and what it held with it."""
        self.died = self.died or EngineDeadError(reason)
        self.rank_stats = {rank: ended(stats) for rank, stats in self.rank_stats.items()}
        if len(self.engines) > 1:
            for engine in self.engines:  # what is left of them waits for each other
                engine.leave()
        self._lose(self.died)

    def _lose(self, error: EngineDeadError) -> None:
        self.dead = self.dead or error
        for queue in self._queues.values():
            queue.put_nowait(self.dead)
        self._questions.lose(self.dead)

    async def _end_processes(self, timeout_s: float = 10.0, *, leave: bool) -> None:
        """Wait for their end, and remove what they leave. `leave`: do not let them finish what they are at."""
        for engine in self.engines if leave else ():
            engine.leave()
        timeout_s = LEAVE_SECONDS if leave else timeout_s
        await asyncio.gather(*(engine.close(timeout_s) for engine in self.engines))
        self._context.term()
        self._folder.cleanup()
