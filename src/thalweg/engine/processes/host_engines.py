"""The data-parallel ranks of a host other than node 0."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from typing import Any

import msgspec
import zmq

from thalweg.config.engine import EngineConfig
from thalweg.engine.processes import messages as m
from thalweg.engine.processes.connection import engine_name, launched
from thalweg.engine.processes.host_link import decode_to_engine
from thalweg.engine.processes.hosts import OnDeath
from thalweg.engine.processes.ipc import SocketFolder, end_group, tell_to_leave
from thalweg.errors import EngineDeadError

LEAVE_SECONDS = 2.0  # for an engine to leave that was told to, unless it hangs


class HostEngines:
    """Engine processes, one for each data-parallel rank of this host. `start` is node 0's, and `config` this host's.

    `sockets` are where they speak, by rank. `on_death(error)` is called, from a watching thread, when one ends before
    `close`.
    """

    def __init__(self, config: EngineConfig, start: m.Start) -> None:
        self._folder = SocketFolder()
        self._context: zmq.Context[Any] = zmq.Context()
        self._closing = False
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self.sockets: dict[int, zmq.Socket[bytes]] = {}
        for rank in config.data_ranks_of(config.node_rank):
            self.sockets[rank], self._processes[rank] = launched(self._context, self._folder.path, rank)
            own = msgspec.structs.replace(start, config=config.to_dict(), data_rank=rank)
            self.sockets[rank].send(m.encode(own))

    def watch(self, on_death: OnDeath) -> None:
        """Begin to wait for every process, each on a thread of its own."""
        for rank, process in self._processes.items():
            threading.Thread(target=self._wait, args=(rank, process, on_death), daemon=True).start()

    def _wait(self, rank: int, process: subprocess.Popen[bytes], on_death: OnDeath) -> None:
        code = process.wait()
        end_group(process.pid)  # of ranks that hang
        if not self._closing:
            on_death(EngineDeadError(f"{engine_name(rank)} ended with exit code {code}; its own lines say why"))

    def send(self, message: bytes) -> None:
        """What node 0 says to one of them."""
        to = decode_to_engine(message)
        self.sockets[to.rank].send(to.message)

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        self._closing = True
        for process in self._processes.values():
            tell_to_leave(process)
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LEAVE_SECONDS)
            end_group(process.pid)
            process.wait()
        for socket in self.sockets.values():
            socket.close()
        self._context.term()
        self._folder.cleanup()
