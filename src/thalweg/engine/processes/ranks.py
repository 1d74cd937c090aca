"""Tensor parallelism: starts the other ranks as processes, sends them every step plan, and notices when one dies."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq

from thalweg.config.engine import EngineConfig
from thalweg.core import StepPlan
from thalweg.engine.processes.ipc import SocketFolder, address, end_group, tell_to_leave
from thalweg.errors import EngineDeadError
from thalweg.recorder.orders import Order


class RankStart(msgspec.Struct, frozen=True):
    """First message to a rank; every later one is a StepPlan, or an Order to record."""

    config: dict[str, Any]
    tp_rank: int
    rendezvous_file: str


_encode = msgspec.msgpack.Encoder().encode
OnDeath = Callable[[EngineDeadError], object]


class OtherRanks:
    """Ranks 1 to tp_size - 1, each a process with a ZeroMQ pipe for its plans. Rank 0 is the process that starts them.

    `on_death(error)` is called, from a watching thread, when one ends before `close`. Sockets lie in `folder`, which
    whoever made it removes; without one, in a folder of their own.
    """

    def __init__(self, config: EngineConfig, folder: Path | None = None) -> None:
        self._own_folder = SocketFolder() if folder is None else None
        folder = folder or self._own_folder.path  # type: ignore[union-attr]
        self.rendezvous_file = str(folder / "rendezvous")
        self._context = zmq.Context()
        self._closing = False
        self._processes: list[subprocess.Popen[bytes]] = []
        self._sockets: list[zmq.Socket[bytes]] = []
        for rank in range(1, config.tensor_parallel_size):
            where = address(folder, f"rank-{rank}")
            socket = self._context.socket(zmq.PUSH)
            socket.setsockopt(zmq.LINGER, 0)
            # The rank binds and this side connects: what is sent before the rank is there waits, and nobody for it.
            socket.connect(where)
            # stdin stays open as long as this process lives: its end tells the rank that nobody needs it any more.
            command = [sys.executable, "-m", "thalweg.engine.processes.rank_main", where]
            self._processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True))
            self._sockets.append(socket)
            socket.send(_encode(RankStart(config.to_dict(), rank, self.rendezvous_file)))

    def watch(self, on_death: OnDeath) -> None:
        """Begin to wait for every rank, each on a thread of its own."""
        for rank, process in enumerate(self._processes, start=1):
            threading.Thread(target=self._wait, args=(rank, process, on_death), daemon=True).start()

    def _wait(self, rank: int, process: subprocess.Popen[bytes], on_death: OnDeath) -> None:
        code = process.wait()
        end_group(process.pid)
        if not self._closing:
            on_death(
                EngineDeadError(f"tensor-parallel rank {rank} ended with exit code {code}; its own lines above say why")
            )

    def send(self, plan: StepPlan | Order) -> None:
        """To be called from one thread only, in the order of the steps."""
        message = _encode(plan)
        for socket in self._sockets:
            with contextlib.suppress(zmq.Again):  # a dead rank's queue is full; the watcher reports it
                socket.send(message, zmq.NOBLOCK)

    @property
    def pids(self) -> list[int]:
        return [p.pid for p in self._processes]

    def close(self, *, keep_folder: bool = False, timeout_s: float = 5.0) -> None:
        """End the ranks. With `keep_folder` a folder of their own goes with this object instead of at once:
        torch looks for a file in a folder that is gone for minutes, and lets no other thread run meanwhile.
        """
        self._closing = True
        for process in self._processes:
            tell_to_leave(process)
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout_s)
            end_group(process.pid)
            process.wait()
        for socket in self._sockets:
            socket.close()
        self._context.term()
        if self._own_folder is not None and not keep_folder:
            self._own_folder.cleanup()
