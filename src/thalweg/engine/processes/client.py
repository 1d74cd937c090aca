"""The front end's side of the engine processes: sends requests, hands each one its updates."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from thalweg.config.engine import EngineConfig
from thalweg.core import Request, RequestUpdate, SamplingParams
from thalweg.engine.processes import messages as m
from thalweg.engine.processes.engines import Engines
from thalweg.engine.processes.profiler import Profiler, ProfilerOptions, Trace
from thalweg.errors import EngineDeadError, InvalidRequest, RequestTimeout, ThalwegError
from thalweg.scheduler.scheduler import check_prompt_length
from thalweg.text.codec import TextCodec, load_codec
from thalweg.text.output import Delta, OutputProcessor, TextReader
from thalweg.text.prompts import check_params, check_token_ids

MAX_UNREAD = 16_384  # updates that may wait for whoever asked for them


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Seconds a request may wait for its slot, and may take in all. None: as long as it wants."""

    queue_timeout: float | None = None
    request_timeout: float | None = None


class EngineClient(Engines):
    """Engine processes as a server has them, for one asyncio loop. `start`, then `generate` as often as wanted,
    `close`. When an engine dies, or says nothing for longer than a step may take, every request under way, and every
    later one, raises EngineDeadError.
    """

    def __init__(
        self,
        config: EngineConfig,
        limits: RequestLimits | None = None,
        profiler: ProfilerOptions | None = None,
        debug: bool = False,
    ) -> None:
        """With `debug` the engine process says on standard error what it decides, such as why a prefix is not used.
        Raises ConfigError, as load_codec does."""
        self._limits, self.profiler = limits or RequestLimits(), profiler
        super().__init__(config, m.Start(config.to_dict(), self._limits.queue_timeout, debug))
        share = config.tensor_parallel_size
        ranks = config.data_parallel_size * share
        self._profiler = None if profiler is None else Profiler(self.order, profiler, ranks, share)
        self.codec: TextCodec = load_codec(config)  # refuses a bad folder before a process is started
        self._queues: dict[str, asyncio.Queue[Delta | ThalwegError]] = {}
        self._ids = itertools.count()

    async def start(self) -> None:
        await super().start()
        self._outputs = OutputProcessor(self.codec.tokenizer, frozenset(self.info.eos_token_ids))
        if self._profiler is not None:
            await self._profiler.warm_up()

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
            if self._profiler is not None:
                self._profiler.added(request)
            self._add([request])
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
            if self._profiler is not None:
                self._profiler.ended(request_id)

    async def start_profile(self, num_steps: int | None = None) -> None:
        """Record the steps from the next one on. Only with `profiler` options.

        Raises ProfileConflict if a recording is under way, InvalidRequest for too many steps, RequestTimeout if the
        engine does not answer, EngineDeadError.
        """
        assert self._profiler is not None
        await self._profiler.start(num_steps)

    async def stop_profile(self) -> Trace:
        """End the recording, or take the trace of the last one if it ended by itself. Raises as start_profile, and
        ThalwegError if the trace could not be written."""
        assert self._profiler is not None
        return await self._profiler.stop()

    async def close(self) -> None:
        if self._profiler is not None:
            await self._profiler.close()
        await super().close()

    def _updated(self, updates: list[RequestUpdate], sent_at: float) -> None:
        if self._profiler is not None:
            self._profiler.updated(updates, sent_at)
        for update in updates:
            self._take(update, sent_at)

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

    def _refused(self, request_id: str, error: ThalwegError) -> None:
        self._outputs.discard(request_id)
        if (queue := self._queues.get(request_id)) is not None:
            queue.put_nowait(error)

    def _lost(self, error: EngineDeadError) -> None:
        if self._profiler is not None:
            self._profiler.lost = error
        for queue in self._queues.values():
            queue.put_nowait(error)
