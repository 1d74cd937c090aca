"""Data-parallel ranks of other hosts as the front end sees them: spoken to by way of those hosts' launchers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any

import msgspec

from thalweg.assembly.info import EngineInfo
from thalweg.config.engine import EngineConfig
from thalweg.engine.processes import messages as m
from thalweg.engine.processes.connection import engine_name, information
from thalweg.engine.processes.host_link import ToEngine, cluster_key
from thalweg.engine.processes.hosts import OtherHosts
from thalweg.errors import EngineDeadError


class RemoteEngine:
    """One engine process of another host, which that host's launcher starts, watches and ends."""

    def __init__(self, hosts: OtherHosts, node: int, rank: int, lost: asyncio.Future[str]) -> None:
        """`lost` says why, once any of the hosts is lost."""
        self.rank = rank
        self._name = f"{engine_name(rank)} on node {node}"
        self._hosts, self._node, self._lost = hosts, node, lost
        self.said: asyncio.Queue[bytes] = asyncio.Queue()

    async def ready(self, start: m.Start) -> EngineInfo:
        """`start` came to its host when that joined."""
        receive = asyncio.ensure_future(self.receive())
        try:
            either: list[asyncio.Future[Any]] = [receive, self._lost]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not receive.done():
                raise EngineDeadError(self._lost.result())
            return information(receive.result(), self._name)
        finally:
            receive.cancel()

    def post(self, message: m.ToEngine) -> None:
        self._hosts.send_to(self._node, ToEngine(self.rank, m.encode(message)))

    async def receive(self) -> m.FromEngine:
        message = m.decode_from_engine(await self.said.get())
        if isinstance(message, m.Updates):
            return msgspec.structs.replace(message, sent_at=time.monotonic())  # by this host's clock
        if isinstance(message, m.Dead):
            return msgspec.structs.replace(message, reason=f"node {self._node}: {message.reason}")
        return message

    async def end(self) -> str:
        return await asyncio.shield(self._lost)


class RemoteEngines:
    """All of them, for one asyncio loop, and the place where data-parallel ranks meet. `start` is what they start with,
    but for their hosts' own options. Raises ConfigError if other hosts cannot reach this one, or without a key."""

    def __init__(self, config: EngineConfig, start: m.Start) -> None:
        self._hosts = OtherHosts(config, cluster_key(), start)
        self.listener, self.meeting = self._hosts.listener, self._hosts.meeting
        self._loop = asyncio.get_running_loop()
        self._lost: asyncio.Future[str] = self._loop.create_future()
        ranks = {rank: node for node in range(1, config.nnodes) for rank in config.data_ranks_of(node)}
        self.engines = [RemoteEngine(self._hosts, node, rank, self._lost) for rank, node in ranks.items()]
        self._by_rank = {engine.rank: engine for engine in self.engines}

    def watch(self) -> None:
        """Await the hosts, and hear what they say; once whoever needs the `listener` has it."""
        self._hosts.watch(
            lambda error: self._soon(self._lose, str(error)),
            lambda rank, message: self._soon(self._by_rank[rank].said.put_nowait, message),
        )
        self.listener.close()

    def end(self, reason: str) -> None:
        """Have the hosts end; `reason` is empty if nothing failed."""
        self._hosts.end(reason)

    async def close(self, reason: str) -> None:
        """The same, and hear no more of them."""
        await asyncio.to_thread(self._hosts.close, reason)

    def _lose(self, reason: str) -> None:
        if not self._lost.done():
            self._lost.set_result(reason)

    def _soon(self, what: Callable[..., object], given: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(what, given)
