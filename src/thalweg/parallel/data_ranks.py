"""Ranks that each serve requests of their own and divide the routed experts among them.

One host: they meet through a file, and agree over gloo; rows of tokens go over gloo (CPU) or NCCL (CUDA).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor

from thalweg.errors import RankLostError
from thalweg.parallel.groups import file_store, leave


class DataRanks:
    """This process is `rank` of `size`. With one rank every method is free.

    Every method is a collective: all ranks call the same ones in the same order, from one thread each.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, host: Any = None, device: Any = None, file: BinaryIO | None = None
    ) -> None:
        """`host` is the group for integers of the host, `device` the one for tensors; `file`: where they met."""
        self.rank, self.size = rank, size
        self._host, self._device, self._file = host, device, file  # in this order, as of a Mesh

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

    def close(self) -> None:
        leave(self._device)
        self._host = self._device = None
        if self._file is not None:
            self._file.close()

    def _run(self, collective: Callable[[], Any]) -> None:
        try:
            collective().wait()
        except RuntimeError as e:
            reason = str(e).splitlines()[0]
            raise RankLostError(f"data-parallel rank {self.rank} lost another rank of {self.size}: {reason}") from e


def join_data_ranks(
    rank: int, size: int, rendezvous_file: str, device: torch.device, timeout_s: float = 600.0
) -> DataRanks:
    """Meet the other ranks at `rendezvous_file`, a path on this host that no others meet at."""
    if size == 1:
        return DataRanks()
    store, file = file_store(rendezvous_file, size)
    timeout = timedelta(seconds=timeout_s)
    gloo: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    gloo._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]  # ranks are processes of one host
    gloo._timeout = timeout
    host = dist.ProcessGroupGloo(dist.PrefixStore("host", store), rank, size, gloo)  # type: ignore[attr-defined]
    if device.type != "cuda":
        return DataRanks(rank, size, host, host, file)
    nccl = dist.ProcessGroupNCCL.Options()
    nccl._timeout = timeout
    tensors = dist.ProcessGroupNCCL(dist.PrefixStore("tensors", store), rank, size, nccl)  # type: ignore[attr-defined]
    return DataRanks(rank, size, host, tensors, file)
