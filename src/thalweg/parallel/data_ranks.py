"""Ranks that each serve requests of their own and divide the routed experts among them.

Those of one host meet through a file, those of several through a TCP store. They agree over gloo; rows of tokens go
over gloo (CPU) or NCCL (CUDA).
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor

from thalweg.errors import RankLostError
from thalweg.parallel.groups import file_store, leave, nccl_group, tcp_store, together

if TYPE_CHECKING:
    from thalweg.parallel.peers import PeerMemory


class DataRanks:
    """This process is `rank` of `size`, over so many `hosts`. With one rank every method is free.

    Every method is a collective: all ranks call the same ones in the same order, from one thread each.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        host: Any = None,
        device: Any = None,
        file: BinaryIO | None = None,
        hosts: int = 1,
    ) -> None:
        """`host` is the group for integers of the host, `device` the one for tensors; `file`: where they met."""
        self.rank, self.size, self.hosts = rank, size, hosts
        self._host, self._device, self._file = host, device, file  # in this order, as of a Mesh
        self.pads = False  # whether rows are padded in all steps, and not only in graphs of decode rows
        self.rows = 0  # that every rank is to have in the next step, padded; 0: its own, of which the others hear in it
        self.decodes = False  # whether no rank has anything but decode rows in the next step
        self.live_R: Tensor | None = None  # while a padded step runs: see `padded`
        self.peers: PeerMemory | None = None  # that the ranks map from one another, if they can

    def all_to_all(self, rows_ND: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """`rows_ND` begins with `sent[0]` rows for rank 0, then come those for rank 1, and so on; the result [M, D] has
        `received[r]` rows from each rank r, in rank order. Any dtype; contiguous."""
        if self._device is None:
            return rows_ND
        group = self._device
        out = rows_ND.new_empty(sum(received), rows_ND.shape[1])
        # Bytes: gloo and NCCL know different dtypes.
        to, of = out.view(torch.uint8), rows_ND.contiguous().view(torch.uint8)
        self._run(lambda: group.alltoall_base(to, of, list(received), list(sent)))
        return out

    @property
    def mapped(self) -> bool:
        """Whether kernels may use `peers`. Ranks that joined nobody, as those that are only looked at, say yes."""
        return self.peers is not None or self._device is None

    @contextmanager
    def padded(self, live_R: Tensor) -> Iterator[None]:
        """Around a step in which every rank has R rows, so that nothing waits for the device. This rank's own tokens
        are the first of them, as many or fewer; those whose live_R, int64, is 0 are padding too."""
        self.live_R = live_R
        try:
            yield
        finally:
            self.live_R = None

    def gather(self, x_TD: Tensor) -> Tensor:
        """Every rank's x, of the same shape, one below the other in rank order: [size * T, D]."""
        if self._device is None:
            return x_TD
        group, x_TD = self._device, x_TD.contiguous()
        out = x_TD.new_empty(self.size * len(x_TD), x_TD.shape[1])
        self._run(lambda: group._allgather_base(out.view(torch.uint8), x_TD.view(torch.uint8)))
        return out

    def exchange(self, x_RN: Tensor) -> Tensor:
        """Row r of x [size, N] goes to rank r; row r of the result is what rank r sent here."""
        return self.all_to_all(x_RN, [1] * self.size, [1] * self.size)

    def maxima(self, values: Sequence[int], timeout_s: float | None = None) -> list[int]:
        """The largest of the ranks' values, one by one; on the host alone. `timeout_s`: as Mesh.minimum."""
        if self._host is None:
            return list(values)
        group, options = self._host, dist.AllreduceOptions()
        if timeout_s is not None:
            options.timeout = timedelta(seconds=timeout_s)
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
        x = torch.tensor(values, dtype=torch.int64)
        self._run(lambda: group.allreduce([x], options))
        most: list[int] = x.tolist()
        return most

    def minimum(self, value: int, timeout_s: float | None = None) -> int:
        """The least of the ranks' values."""
        return -self.maxima([-value], timeout_s)[0]

    def gather_bytes(self, own: bytes) -> list[bytes]:
        """Every rank's `own`, in rank order, all of one length; on the host alone."""
        group, x = self._host, torch.frombuffer(bytearray(own), dtype=torch.uint8)
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._run(lambda: group.allgather([parts], [x]))
        return [bytes(part.tolist()) for part in parts]

    def check(self) -> None:
        """As Mesh.check."""
        if self.peers is not None and self.peers.stopped:
            raise RankLostError(f"data-parallel rank {self.rank} lost another rank of {self.size}: its process ended")

    def close(self) -> None:
        leave(self._device)
        self._host = self._device = None
        if self.peers is not None:
            self.peers.close()
        if self._file is not None:
            self._file.close()

    def _run(self, collective: Callable[[], Any]) -> None:
        with together(f"data-parallel rank {self.rank}", self.size):
            collective().wait()


def join_data_ranks(
    rank: int,
    size: int,
    meeting: str,
    device: torch.device,
    timeout_s: float = 600.0,
    *,
    part: int = 0,
    hosts: int = 1,
    listener: socket.socket | None = None,
) -> DataRanks:
    """Meet the other ranks of the same `part`, which is a tensor-parallel rank, at `meeting`: a path on this host that
    no others meet at, or tcp://ADDRESS:PORT, where one rank of all parts has a `listener` that this takes over. Raises
    RankLostError."""
    if size == 1:
        return DataRanks()
    with together(f"data-parallel rank {rank}", size):
        return _joined(rank, size, meeting, device, timedelta(seconds=timeout_s), part, hosts, listener)


def _joined(
    rank: int,
    size: int,
    meeting: str,
    device: torch.device,
    timeout: timedelta,
    part: int,
    hosts: int,
    listener: socket.socket | None,
) -> DataRanks:
    own, file = "127.0.0.1", None
    if meeting.startswith("tcp://"):
        store, own = tcp_store(meeting, timeout, listener)
        store = dist.PrefixStore(f"part {part}", store)  # type: ignore[attr-defined]
    else:
        store, file = file_store(f"{meeting}-{part}", size)
    gloo: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=own)]  # listens there alone
    gloo._timeout = timeout
    host = dist.ProcessGroupGloo(dist.PrefixStore("host", store), rank, size, gloo)  # type: ignore[attr-defined]
    if device.type != "cuda":
        return DataRanks(rank, size, host, host, file, hosts)
    tensors = nccl_group(dist.PrefixStore("tensors", store), rank, size, timeout)  # type: ignore[attr-defined]
    ranks = DataRanks(rank, size, host, tensors, file, hosts)
    ranks.pads = True  # the host would wait for the device; on a CPU there is nothing to wait for
    return ranks
