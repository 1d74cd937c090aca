"""Tensor parallelism: starts the other ranks as processes, sends them every step plan, and notices when one dies.

Ranks of other hosts are those hosts' own processes, which node 0 reaches by way of `hosts`."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import zmq

from thalweg.config.engine import EngineConfig
from thalweg.core import StepPlan
from thalweg.engine.processes.host_link import cluster_key
from thalweg.engine.processes.hosts import OnDeath, OtherHosts
from thalweg.engine.processes.ipc import SocketFolder, address, end_group, tell_to_leave
from thalweg.engine.processes.ray_hosts import RayHosts
from thalweg.errors import EngineDeadError
from thalweg.recorder.orders import Order
from thalweg.runner.lock_step import Agreed


class RankStart(msgspec.Struct, frozen=True):
    """First message to a rank; every later one is a StepPlan, an Order to record, or an Agreed before a step."""

    config: dict[str, Any]
    tp_rank: int
    meeting: str
    data_rank: int = 0
    data_meeting: str = ""


encode = msgspec.msgpack.Encoder().encode


class LocalRanks:
    """The ranks of this host, without rank 0: each a process with a ZeroMQ pipe for its plans.

    `on_death(error)` is called, from a watching thread, when one ends before `close`. Sockets lie in `folder`, which
    whoever made it removes; without one, in a folder of their own. They meet at `meeting` (see join_mesh); "" is a file
    in that folder. With --data-parallel-size it is that of all engines of this host, of which this one is `data_rank`,
    and all meet at `data_meeting`.
    """

    def __init__(
        self,
        config: EngineConfig,
        meeting: str = "",
        folder: Path | None = None,
        data_rank: int = 0,
        data_meeting: str = "",
    ) -> None:
        self._own_folder = SocketFolder() if folder is None else None
        folder = folder or self._own_folder.path  # type: ignore[union-attr]
        of = f"engine-{data_rank}-" if data_rank else ""  # whose ranks these are, if others have some in that folder
        self.meeting = meeting or str(folder / f"{of}rendezvous")
        self._context = zmq.Context()
        self._closing = False
        self._of = f" of data-parallel rank {data_rank}" if config.data_parallel_size > 1 else ""
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._sockets: list[zmq.Socket[bytes]] = []
        # Those of an engine process share its session and end with it, even if they hang. Others have one of their own,
        # which Ctrl-C in the user's terminal does not reach.
        own_session = self._own_folder is not None
        for rank in config.tensor_ranks_here:
            if rank == 0:
                continue  # which is the engine process
            where = address(folder, f"{of}rank-{rank}")
            socket = self._context.socket(zmq.PUSH)
            socket.setsockopt(zmq.LINGER, 0)
            # The rank binds and this side connects: what is sent before the rank is there waits, and nobody for it.
            socket.connect(where)
            # stdin stays open as long as this process lives: its end tells the rank that nobody needs it any more.
            command = [sys.executable, "-m", "thalweg.engine.processes.rank_main", where]
            self._processes[rank] = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=own_session)
            self._sockets.append(socket)
            start = RankStart(config.to_dict(), rank, self.meeting, data_rank, data_meeting)
            socket.send(encode(start))

    def watch(self, on_death: OnDeath) -> None:
        """Begin to wait for every rank, each on a thread of its own."""
        for rank, process in self._processes.items():
            threading.Thread(target=self._wait, args=(rank, process, on_death), daemon=True).start()

    def _wait(self, rank: int, process: subprocess.Popen[bytes], on_death: OnDeath) -> None:
        code = process.wait()
        end_group(process.pid)
        if not self._closing:
            which = f"tensor-parallel rank {rank}{self._of}"
            on_death(EngineDeadError(f"{which} ended with exit code {code}; its own lines say why"))

    def send(self, message: bytes) -> None:
        """A StepPlan, Order or Agreed; to be called from one thread only, in the order of the steps."""
        for socket in self._sockets:
            with contextlib.suppress(zmq.Again):  # a dead rank's queue is full; the watcher reports it
                socket.send(message, zmq.NOBLOCK)

    @property
    def pids(self) -> list[int]:
        return [p.pid for p in self._processes.values()]

    def close(self, timeout_s: float = 5.0) -> None:
        """End the ranks."""
        self._closing = True
        for process in self._processes.values():
            tell_to_leave(process)
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout_s)
            process.kill()
            end_group(process.pid)
            process.wait()
        for socket in self._sockets:
            socket.close()
        self._context.term()
        if self._own_folder is not None:
            self._own_folder.cleanup()


class OtherRanks:
    """All ranks but rank 0, which is the process that makes this: those of this host, and those of other hosts.

    `folder`, `data_rank`, `data_meeting`, `on_death`: as LocalRanks. `config` is the engine's, with places if Ray has
    chosen them. Raises ConfigError if other hosts cannot reach this one, or Ray finds no place; UnsupportedError
    without Ray.
    """

    def __init__(
        self, config: EngineConfig, folder: Path | None = None, data_rank: int = 0, data_meeting: str = ""
    ) -> None:
        self._ray = RayHosts(config) if config.distributed_executor_backend == "ray" else None
        self._hosts = None
        self.config = config = config if self._ray is None else self._ray.config
        try:
            if config.nodes_per_model > 1:
                self._hosts = OtherHosts(config, cluster_key() if self._ray is None else self._ray.key)
            self.listener = self._hosts.listener if self._hosts else None
            meeting = self._hosts.meeting if self._hosts else ""
            self._local = LocalRanks(config, meeting, folder, data_rank, data_meeting)
        except BaseException:
            if self._ray is not None:
                self._ray.close()
            raise
        self.meeting = self._local.meeting

    def watch(self, on_death: OnDeath) -> None:
        self._local.watch(on_death)
        if self._hosts is not None:
            self._hosts.watch(on_death)
        if self._ray is not None:
            self._ray.watch(on_death)

    def send(self, plan: StepPlan | Order | Agreed) -> None:
        """To be called from one thread only, in the order of the steps."""
        message = encode(plan)
        if self._hosts is not None:
            self._hosts.send(message)
        self._local.send(message)

    @property
    def pids(self) -> list[int]:
        """Of the ranks on this host."""
        return self._local.pids

    def close(self, reason: str = "") -> None:
        """End the ranks; `reason` tells other hosts what failed."""
        if self._hosts is not None:
            self._hosts.close(reason)
        self._local.close()
        if self._ray is not None:
            self._ray.close()
