"""The ranks a model is sharded over, and the collectives its layers need. The only importer of torch.distributed.

Ranks of one host meet through a file, those of several through a TCP store; they talk over gloo (CPU) or NCCL (CUDA).
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor

from thalweg.errors import RankLostError
from thalweg.parallel.data_ranks import DataRanks
from thalweg.parallel.groups import file_store, leave, nccl_group, tcp_store, together

if TYPE_CHECKING:
    from thalweg.parallel.peers import PeerMemory

LOADING_SECONDS = 86_400.0  # more than any disk takes


class Mesh:
    """Tensor parallelism over `tp_size` ranks; this process is `tp_rank`. With one rank every method is free.

    `data` are the ranks that serve other requests, with which this one shares the experts. `hosts`: over how many hosts
    the ranks are spread. `peers` is memory that ranks of one host map from one another, if they can (`map_peers`).
    """

    def __init__(
        self,
        tp_rank: int = 0,
        tp_size: int = 1,
        group: Any = None,
        data: DataRanks | None = None,
        hosts: int = 1,
        file: BinaryIO | None = None,
    ) -> None:
        """`file`: where the ranks met (`file_store`)."""
        self._group, self._file = group, file  # in this order: a mesh that is not closed lets its group go first
        self.hosts = hosts
        self.tp_rank = tp_rank
        self.tp_size = tp_size
        self.data = data or DataRanks()
        self.peers: PeerMemory | None = None
        self._abandoned = False

    @property
    def mapped(self) -> bool:
        """Whether kernels may use `peers`. A mesh that joined nobody, as one that is only looked at, says yes."""
        return self.peers is not None or self._group is None

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self._group is not None:
            group = self._group
            self._run(lambda: group.allreduce([x]))
        return x

    def all_gather_last(self, x: Tensor) -> Tensor:
        """Concatenate the ranks' x [..., n] along the last dimension, in rank order: [..., tp_size * n]."""
        if self._group is None:
            return x
        group, x = self._group, x.contiguous()
        parts = x.new_empty(self.tp_size * len(x), *x.shape[1:])
        self._run(lambda: group._allgather_base(parts, x))
        return torch.cat(list(parts.view(self.tp_size, *x.shape)), dim=-1)

    def gather_bytes(self, own: bytes, device: torch.device) -> list[bytes]:
        """Every rank's `own`, in rank order, all of one length."""
        x = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(device)
        found = [bytes(part.cpu().tolist()) for part in self.all_gather_last(x).split(len(own))]
        self.check()
        return found

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's x on every rank, in place."""
        if self._group is not None:
            group, options = self._group, dist.BroadcastOptions()
            options.rootRank = 0
            self._run(lambda: group.broadcast([x], options))
        return x

    def await_loaded(self, device: torch.device) -> None:
        """Returns once every rank has come here, data-parallel ones too, however long their disks take: a rank whose
        process ends is noticed otherwise."""
        self.minimum(0, device, timeout_s=LOADING_SECONDS)

    def minimum(self, value: int, device: torch.device, timeout_s: float | None = None) -> int:
        """The least of the ranks' values, of data-parallel ones too. `timeout_s`: another time than the group's that
        ranks may wait for each other."""
        value = self.data.minimum(value, timeout_s)
        if self._group is None:
            return value
        group, options = self._group, dist.AllreduceOptions()
        if timeout_s is not None:
            options.timeout = timedelta(seconds=timeout_s)
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.MIN)
        x = torch.tensor(value, dtype=torch.int64, device=device)
        self._run(lambda: group.allreduce([x], options))
        least = int(x)
        self.check()
        return least

    def as_data_ranks(self) -> DataRanks:
        """The same ranks as if they were data-parallel ones, to measure what these do."""
        ranks = DataRanks(self.tp_rank, self.tp_size, device=self._group)
        ranks.peers = self.peers
        return ranks

    def check(self) -> None:
        """Raises RankLostError once kernels no longer wait for a rank that ended. What they give then is undefined, so
        this comes after a result is read and before it is used."""
        if self._abandoned or (self.peers is not None and self.peers.stopped):
            raise RankLostError(f"rank {self.tp_rank} lost another rank of {self.tp_size}: its process ended")
        self.data.check()

    def abandon(self, timeout_s: float) -> None:
        """Have NCCL's kernels no longer wait for a rank that ended; from another thread than that of the collectives,
        which then comes back from them. NCCL may take longer than `timeout_s`, as with a device that hangs."""
        self._abandoned = True
        thread = threading.Thread(target=leave, args=(self._group,), name="thalweg-abandon", daemon=True)
        thread.start()
        thread.join(timeout_s)

    def close(self) -> None:
        leave(self._group)
        self._group = None
        if self.peers is not None:
            self.peers.close()
        if self._file is not None:
            self._file.close()
        self.data.close()

    def _run(self, collective: Callable[[], Any]) -> None:
        with together(f"rank {self.tp_rank}", self.tp_size):
            collective().wait()


def join_mesh(
    tp_rank: int,
    tp_size: int,
    meeting: str,
    device: torch.device,
    timeout_s: float = 600.0,
    *,
    hosts: int = 1,
    listener: socket.socket | None = None,
) -> Mesh:
    """Meet the other ranks at `meeting` and return the mesh: a path on this host, of a file that is new or empty, or
    tcp://ADDRESS:PORT, where rank 0 has a `listener` that this takes over.

    The group is this mesh's own, not torch's default one: a process may have several engines, and one that failed to
    meet its ranks stands in no other's way. Raises RankLostError if one does not come.
    """
    if tp_size == 1:
        return Mesh()
    with together(f"rank {tp_rank}", tp_size):
        return _joined(tp_rank, tp_size, meeting, device, timeout_s, hosts, listener)


def _joined(
    tp_rank: int,
    tp_size: int,
    meeting: str,
    device: torch.device,
    timeout_s: float,
    hosts: int,
    listener: socket.socket | None,
) -> Mesh:
    timeout, own, file = timedelta(seconds=timeout_s), "127.0.0.1", None
    if meeting.startswith("tcp://"):
        store, own = tcp_store(meeting, timeout, listener)
    else:
        store, file = file_store(meeting, tp_size)
    if device.type == "cuda":
        mesh = Mesh(tp_rank, tp_size, nccl_group(store, tp_rank, tp_size, timeout), hosts=hosts, file=file)
        if hosts > 1:
            # NCCL connects at the first collective, where others await rank 0 as long as the store does, whatever its
            # own time: so not behind the weights. Ranks of one host have one ahead of these (map_peers).
            mesh.minimum(0, device)
        return mesh
    gloo: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=own)]  # listens there alone
    gloo._timeout = timeout
    return Mesh(tp_rank, tp_size, dist.ProcessGroupGloo(store, tp_rank, tp_size, gloo), hosts=hosts, file=file)
