"""What an LLM runs on: an engine in this process, or with several data-parallel ranks a process for each of them."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, Protocol

from thalweg.assembly.info import EngineInfo
from thalweg.config.engine import EngineConfig
from thalweg.engine.data_parallel import DataParallelEngine
from thalweg.engine.pump import Requests
from thalweg.engine.start import Engine
from thalweg.recorder.orders import Order


class OfflineEngine(Protocol):
    """`info` is of one data-parallel rank."""

    @property
    def info(self) -> EngineInfo: ...
    @property
    def pump(self) -> Requests: ...

    def order(self, order: Order) -> Future[Any]:
        """Have every rank do something between two steps; rank 0's outcome."""

    @property
    def forked(self) -> bool:
        """Whether this is a process that was forked from the one with the engine, which has its threads and ranks."""

    def close(self) -> None:
        """Does nothing if `forked`."""


def start_engine(config: EngineConfig) -> OfflineEngine:
    """Raises what an engine could not start for."""
    return DataParallelEngine(config) if config.data_parallel_size > 1 else Engine(config)
