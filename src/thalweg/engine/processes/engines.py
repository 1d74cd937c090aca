"""Engine processes, one for each data-parallel rank: started, given requests, watched, and ended together."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import zmq.asyncio

from thalweg.assembly.info import EngineInfo
from thalweg.config.engine import EngineConfig
from thalweg.core import Request, RequestUpdate, SchedulerStats
from thalweg.engine.processes import messages as m
from thalweg.engine.processes.balance import Balance, ended, together
from thalweg.engine.processes.connection import AnyEngine, Connection, all_ready
from thalweg.engine.processes.ipc import SocketFolder
from thalweg.engine.processes.questions import Answer, Question, Questions, same_error
from thalweg.engine.processes.remote import RemoteEngines
from thalweg.errors import EngineDeadError, InvalidRequest, ThalwegError
from thalweg.recorder.orders import Order

SAVE_SECONDS = 900.0  # that an engine may take to end when it writes its cache to --cache-folder
LEAVE_SECONDS = 2.0  # for an engine to leave that was told to, unless it hangs
SILENCE = 1.5  # step timeouts without a word after which an engine that has work is taken to hang


class Engines(ABC):
    """The engines of one front end, for one asyncio loop. With --data-parallel-size there are several, and each request
    goes to the one with the least to do. `start`, `add` and `abort` as often as wanted, `close`.

    Who derives from this gets the news of requests. Once an engine has died, or said nothing for longer than a step may
    take, all of them end, and `dead` is set.
    """

    def __init__(self, config: EngineConfig, start: m.Start | None = None) -> None:
        """`start`: another first message than that of an engine with this config and no more."""
        self.config, self._start = config, start or m.Start(config.to_dict())
        self.info: EngineInfo
        self.rank_stats: dict[int, SchedulerStats] = {}  # what each rank last said
        self.dead: EngineDeadError | None = None  # why no request is served any more
        self.died: EngineDeadError | None = None  # the same, if that was not asked for
        self.engines: list[Connection] = []  # of this host
        self._others: RemoteEngines | None = None
        self._ranks: list[AnyEngine] = []  # all
        self._questions = Questions()
        ranks = config.data_parallel_size
        self._balance = Balance(ranks)
        self._heard = [0.0] * ranks  # when each engine last said something, or was given work while it had none
        self._wakes = 0  # wake-ups that were sent to every rank
        self._closing = False
        self._tasks: list[asyncio.Task[None]] = []

    @abstractmethod
    def _updated(self, updates: list[RequestUpdate], sent_at: float) -> None:
        """News of requests; of some perhaps that were aborted."""

    @abstractmethod
    def _refused(self, request_id: str, error: ThalwegError) -> None:
        """An engine did not take a request in, or did not begin it in time."""

    @abstractmethod
    def _lost(self, error: EngineDeadError) -> None:
        """No request gets news any more."""

    @property
    def stats(self) -> SchedulerStats | None:
        """Of all ranks together; None before any has said something."""
        return together(self.rank_stats.values()) if self.rank_stats else None

    async def start(self) -> None:
        """Start the processes and wait until all are ready. Raises what an engine could not start for."""
        c, start, listener = self.config, self._start, None
        ranks, here = c.data_parallel_size, c.data_ranks_of(0)
        others = self._others = RemoteEngines(c, start) if ranks > len(here) else None
        if others is not None:
            start = msgspec.structs.replace(start, data_meeting=others.meeting)
            listener = others.listener.fileno()
        self._folder = SocketFolder()
        self._context = zmq.asyncio.Context()
        for rank in here:
            given = listener if rank == 0 else None
            self.engines.append(Connection(self._context, self._folder.path, rank, ranks, given))
        self._ranks = [*self.engines, *(others.engines if others else ())]
        if others is not None:
            others.watch()
        try:
            self.info = await all_ready(self._ranks, start)
        except Exception as e:
            self._closing = True
            await self._end_processes(leave=ranks > 1, reason=str(e))  # one alone ends by itself
            raise
        watching = [work for e in self._ranks for work in (self._receive(e), self._watch_process(e))]
        self._tasks = [asyncio.create_task(work) for work in (*watching, self._watch_silence())]

    def _add(self, requests: Sequence[Request]) -> None:
        """Hand requests over, those of a rank together."""
        shares: dict[int, list[Request]] = {}
        for request in requests:
            shares.setdefault(self._balance.add(request), []).append(request)
        several = len(self._ranks) > 1
        self._wakes += several
        for engine in self._ranks:
            if share := shares.get(engine.rank):
                if self._balance.requests[engine.rank] == len(share):
                    self._heard[engine.rank] = asyncio.get_running_loop().time()
                engine.post(m.Add(share, self._wakes))
            elif several:
                engine.post(m.Wake(self._wakes))

    def _abort(self, *request_ids: str) -> None:
        """Have the engines end requests, without further updates."""
        shares: dict[int, list[str]] = {}
        for request_id in request_ids:
            self._balance.end(request_id)
            if (rank := self._balance.rank_of(request_id)) is not None:
                shares.setdefault(rank, []).append(request_id)
        for rank, share in shares.items():
            self._ranks[rank].post(m.Abort(share))

    async def expert_counts(self) -> dict[int, list[int]]:
        """Tokens that each expert got, by layer, over all data-parallel ranks since this was first asked. Raises as
        keep."""
        if not self._tasks:
            return {}  # engines that start expect Start first
        ranks = await asyncio.gather(*(self._ask(m.CountExperts, engine) for engine in self._ranks))
        return {layer: [sum(n) for n in zip(*(rank[layer] for rank in ranks), strict=True)] for layer in ranks[0]}

    async def keep(self, name: str, salt: str, token_ids: list[int]) -> int:
        """As EngineCore.keep, on every rank; the most that one of them has. Raises EngineDeadError, or RequestTimeout
        if the engine does not answer."""
        make = lambda question_id: m.Keep(question_id, name, salt, token_ids)  # noqa: E731
        kept: list[int] = await asyncio.gather(*(self._ask(make, engine) for engine in self._ranks))
        return max(kept)

    def release(self, name: str) -> None:
        """As EngineCore.release."""
        for engine in self._ranks if self.dead is None and not self._closing else ():
            engine.post(m.Release(name))

    async def order(self, order: Order) -> list[Any]:
        """Have every rank of all engines do something together, between two steps; the outcome of each engine's rank 0.
        Raises as keep, and what went wrong with it on a rank."""
        self._wakes += 1
        make = lambda question_id, wake=self._wakes: m.Give(question_id, order, wake)  # noqa: E731
        return await asyncio.gather(*(self._ask(make, engine) for engine in self._ranks))

    async def _ask(self, make: Callable[[int], Question], engine: AnyEngine | None = None) -> Any:
        if self.dead is not None:
            raise self.dead
        return await self._questions.ask((engine or self._ranks[0]).post, make)

    async def close(self) -> None:
        """Stop the engine processes, even while they start. Requests under way end with EngineDeadError."""
        if self._closing or not self._ranks:
            return
        self._closing = True
        started = bool(self._tasks)
        reason = str(self.died or "")
        if self._others is not None:
            self._others.end(reason)  # first, or they would miss those of this host
        for engine in self.engines if started else ():
            engine.post(m.Stop())
        self._lose(EngineDeadError("the engine was closed"))
        for task in self._tasks:
            task.cancel()
        # It may have a cache to write down first.
        seconds = 10.0 if self.config.cache_folder is None else SAVE_SECONDS
        leave = not started or (len(self._ranks) > 1 and self.died is not None)
        await self._end_processes(seconds, leave=leave, reason=reason)

    async def _receive(self, engine: AnyEngine) -> None:
        while True:
            message = await engine.receive()
            self._heard[engine.rank] = asyncio.get_running_loop().time()
            if isinstance(message, m.Updates):
                if self.died is None:
                    self.rank_stats[engine.rank] = message.stats
                for update in message.updates:
                    self._balance.came(update.request_id, len(update.token_ids))
                    if update.finish_reason is not None:
                        self._balance.end(update.request_id)
                self._updated(message.updates, message.sent_at)
            elif isinstance(message, m.Refused):
                self._balance.end(message.request_id)
                self._refused(message.request_id, same_error(message.kind, message.reason, InvalidRequest))
            elif isinstance(message, Answer):
                self._questions.take(message)
            elif isinstance(message, m.Dead):
                self._die(f"the engine died: {message.reason}")

    async def _watch_silence(self) -> None:
        allowed, loop = SILENCE * self.config.step_timeout, asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(1.0, allowed / 4))
            # Answers that are done and not yet read do not concern the engine.
            for engine in self._ranks:
                if self._balance.requests[engine.rank] and loop.time() - self._heard[engine.rank] > allowed:
                    self._die(f"the engine has said nothing for {allowed:g} s; it hangs (--step-timeout)")
                    if isinstance(engine, Connection):
                        engine.process.kill()
                    return

    async def _watch_process(self, engine: AnyEngine) -> None:
        self._die(await engine.end())

    def _die(self, reason: str) -> None:
        """The engine is gone, and what it held with it."""
        self.died = self.died or EngineDeadError(reason)
        self.rank_stats = {rank: ended(stats) for rank, stats in self.rank_stats.items()}
        if len(self._ranks) > 1:
            for engine in self.engines:  # what is left of them waits for each other
                engine.leave()
        if self._others is not None:
            self._others.end(str(self.died))
        self._lose(self.died)

    def _lose(self, error: EngineDeadError) -> None:
        self.dead = self.dead or error
        self._lost(self.dead)
        self._questions.lose(self.dead)

    async def _end_processes(self, timeout_s: float = 10.0, *, leave: bool, reason: str) -> None:
        """Wait for their end, and remove what they leave. `leave`: do not let them finish what they are at. `reason` is
        for other hosts."""
        for engine in self.engines if leave else ():
            engine.leave()
        timeout_s = LEAVE_SECONDS if leave else timeout_s
        others = [] if self._others is None else [self._others.close(reason)]
        await asyncio.gather(*(engine.close(timeout_s) for engine in self.engines), *others)
        self._context.term()
        self._folder.cleanup()
