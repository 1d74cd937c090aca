"""Tensor parallelism: starts the other ranks as processes, sends them every step plan, and notices when one dies."""

from __future__ import annotations

import contextlib
import os
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
from thalweg.engine.processes.ipc import socket_folder
from thalweg.errors import EngineDeadError


class RankStart(msgspec.Struct, frozen=True):
    """First message to a rank; every later one is a StepPlan."""

    config: dict[str, Any]
    tp_rank: int
    rendezvous_file: str


_encode = msgspec.msgpack.Encoder().encode
OnDeath = Callable[[EngineDeadError], object]


class OtherRanks:
    """Ranks 1 to tp_size - 1, each a process with a ZeroMQ pipe for its plans. Rank 0 is the process that starts them.

    `on_death(error)` is called, from a watching thread, when one ends before `close`.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._folder = socket_folder()
        self.rendezvous_file = str(Path(self._folder.name) / "rendezvous")
        self._context = zmq.Context()
        self._closing = False
        self._processes: list[subprocess.Popen[bytes]] = []
        self._sockets: list[zmq.Socket[bytes]] = []
        for rank in range(1, config.tensor_parallel_size):
            address = f"ipc://{self._folder.name}/rank-{rank}"
            socket = self._context.socket(zmq.PUSH)
            socket.setsockopt(zmq.LINGER, 0)
            # The rank binds and this side connects: what is sent before the rank is there waits, and nobody for it.
            socket.connect(address)
            # stdin stays open as long as this process lives: its end tells the rank that nobody needs it any more.
            command = [sys.executable, "-m", "thalweg.engine.processes.rank_main", address]
            self._processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True))
            self._sockets.append(socket)
            socket.send(_encode(RankStart(config.to_dict(), rank, self.rendezvous_file)))

    def watch(self, on_death: OnDeath) -> None:
        """Begin to wait for every rank, each on a thread of its own."""
        for rank, process in enumerate(self._processes, start=1):
            threading.Thread(target=self._wait, args=(rank, process, on_death), daemon=True).start()

    def _wait(self, rank: int, process: subprocess.Popen[bytes], on_death: OnDeath) -> None:
        code = process.wait()
        if not self._closing:
            on_death(
                EngineDeadError(f"tensor-parallel rank {rank} ended with exit code {code}; its own lines above say why")
            )

    def send(self, plan: StepPlan) -> None:
        """To be called from one thread only, in the order of the steps."""
        message = _encode(plan)
        for socket in self._sockets:
            with contextlib.suppress(zmq.Again):  # a dead rank's queue is full; the watcher reports it
                socket.send(message, zmq.NOBLOCK)

    @property
    def pids(self) -> list[int]:
        return [p.pid for p in self._processes]

    def close(self, *, keep_folder: bool = False, timeout_s: float = 5.0) -> None:
        """End the ranks. With `keep_folder` the rendezvous file's folder goes with this object instead of at once:
        torch looks for a file in a folder that is gone for minutes, and lets no other thread run meanwhile.
        """
        self._closing = True
        for process in self._processes:
            with contextlib.suppress(OSError):
                assert process.stdin is not None
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for socket in self._sockets:
            socket.close()
        self._context.term()
        if not keep_folder:
            self._folder.cleanup()


def end_with_parent() -> None:
    """Leave at once when standard input ends, which the parent holds open: no orphan keeps memory or a device."""

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        os._exit(0)

    threading.Thread(target=wait, name="thalweg-parent-watch", daemon=True).start()
